"""The server that serving_ranks.py compares with: a model behind uvicorn, no batching, no checks, no metrics.

python benchmarks/plain_server.py model.keras 8000
"""

import json
import sys

import keras
import numpy as np
import tensorflow as tf
import uvicorn

model = keras.models.load_model(sys.argv[1])
call = tf.function(lambda x: model(x, training=False), reduce_retracing=True)


async def app(scope, receive, send):
    body, more = b"", scope["type"] == "http" and scope["method"] == "POST"
    while more:
        message = await receive()
        body, more = body + message["body"], message.get("more_body", False)
    answer = {}
    if body:
        given = json.loads(body)["inputs"][0]
        rows = call(np.array(given["data"], "float32").reshape(given["shape"])).numpy()
        answer = {"outputs": [{"name": "y", "shape": rows.shape, "data": rows.ravel().tolist()}]}
    text = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", lifespan="off")
