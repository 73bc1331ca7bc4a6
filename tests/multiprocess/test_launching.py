"""`hvd.run` as a notebook uses it: functions without a file, in a process that has used TensorFlow."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multiprocess

NOTEBOOK = """
import json, time
import tensorflow as tf
import hvdext as hvd
from hvdext.comm.current import current

tf.reduce_sum(tf.ones([300, 300]) @ tf.ones([300, 300]))
offset = 1000

def train(base, *, scale):
    hvd.init()
    mine = tf.constant([hvd.rank() + 1.0])
    (total,) = current().allreduce([mine], "hvdext.test.sum")
    print("printed by", hvd.rank())
    return {"rank": hvd.rank(), "sum": float(total[0]), "value": (base + hvd.rank()) * scale + offset}

results = hvd.run(train, (5,), {"scale": 2}, np=2)

def fail():
    import os
    if os.environ["HOROVOD_RANK"] == "0":
        time.sleep(100)
    raise ValueError("the culprit's own words")

start = time.monotonic()
try:
    hvd.run(fail, np=2)
except RuntimeError as error:
    failure = {"rank": error.rank, "text": str(error), "seconds": time.monotonic() - start}
print("RESULT", json.dumps([results, failure]))
"""


def test_run_from_a_notebook():
    # On standard input: like a notebook's cells, the code has no file that a rank could import.
    done = subprocess.run(
        [sys.executable, "-"],
        input=NOTEBOOK,
        env=os.environ | {"HVDEXT_DEADLINE": "60", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    (found,) = [line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT ")]
    results, failure = json.loads(found)

    assert results == [
        {"rank": 0, "sum": 3.0, "value": 1010},
        {"rank": 1, "sum": 3.0, "value": 1012},
    ]
    assert "printed by 1" in done.stdout
    assert failure["rank"] == 1
    assert failure["text"].startswith("hvd.run: rank 1 failed:")
    assert "ValueError: the culprit's own words" in failure["text"]
    assert failure["seconds"] < 60  # rank 0 would have slept on
