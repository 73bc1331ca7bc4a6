"""One rank of slices.py."""

from __future__ import annotations

import json
import time

import keras
import numpy as np
import tensorflow as tf
from measuring import take_core, worker_parser

import hvdext as hvd

TOKENS, WIDTH, HEADS, HIDDEN, BATCH = 64, 256, 4, 1024, 8
CUT = {"attention": "heads", "up": "column", "down": "row"}


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    take_core(hvd.local_rank(), hvd.local_size())
    keras.utils.set_random_seed(0)
    n = hvd.size()
    models = {
        "cut": hvd.slice_layers(lambda: layer(HEADS, HIDDEN), CUT),
        "alone": layer(HEADS // n, HIDDEN // n),
    }
    for model in models.values():
        model.compile(keras.optimizers.SGD(1e-4), "mse", jit_compile=False)
    rows = np.random.default_rng(0).normal(size=(8 * BATCH, TOKENS, WIDTH)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((rows, rows)).batch(BATCH).cache().repeat()
    results = {kind: [] for kind in models}
    for i in range(options.rounds + 1):  # the first compiles
        for kind, model in models.items():
            hvd.barrier()
            before = sent()
            seconds = time_of_step(model, data, options.steps)
            if kind == "cut":
                per_step = (sent() - before) / (2 * options.steps)
            if i > 0:
                results[kind].append(seconds)
    message = 4 * BATCH * TOKENS * WIDTH
    results["bytes"] = message
    results["exchanges"] = per_step / (2 * (n - 1) / n * message)
    if hvd.rank() == 0:
        options.result.write_text(json.dumps(results))
    hvd.barrier()


def parse_arguments():
    parser = worker_parser()
    parser.add_argument("--steps", type=int, required=True)
    return parser.parse_args()


def layer(heads, hidden):
    tokens = keras.Input((TOKENS, WIDTH))
    normal = keras.layers.LayerNormalization(name="normal_1")(tokens)
    attention = keras.layers.MultiHeadAttention(heads, WIDTH // HEADS, name="attention")
    x = tokens + attention(normal, normal)
    normal = keras.layers.LayerNormalization(name="normal_2")(x)
    up = keras.layers.Dense(hidden, activation="gelu", name="up")(normal)
    return keras.Model(tokens, x + keras.layers.Dense(WIDTH, name="down")(up), name=f"layer_of_{heads}")


def time_of_step(model, data, steps):
    """Seconds; the first of two epochs is not counted."""
    times = []
    begin = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: times.append(-time.perf_counter()),
        on_epoch_end=lambda *_: times.append(times.pop() + time.perf_counter()),
    )
    model.fit(data, steps_per_epoch=steps, epochs=2, callbacks=[begin], verbose=0)
    return times[1] / steps


def sent():
    found = hvd.traffic().get("slices")
    return found.bytes if found else 0


if __name__ == "__main__":
    main()
