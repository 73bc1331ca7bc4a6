"""One rank of the memory measurement of slices: trains an MLP of a given size with Adam, cut or whole.

    python benchmarks/sliced_memory_worker.py '{"megabytes": 400, "sliced": false}' whole.json
    horovodrun -np 2 python benchmarks/sliced_memory_worker.py '{"megabytes": 400, "sliced": true}' cut.json

The model is a stack of pairs of Dense layers, 2048 -> 8192 -> 2048, which are 128 MiB of float32 each; the
last pair is narrower, so that the weights are as many megabytes (10^6 bytes) as asked for. It comes from a
builder, so that no rank holds the whole of it. What is measured is the peak of resident memory (ru_maxrss)
above that of the same process with TensorFlow started and nothing built.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from measuring import peak_resident

import hvdext as hvd

WIDTH, HIDDEN = 2048, 8192


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=json.loads)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    hvd.init()
    found = train(**options.job)
    everyone = hvd.allgather_object(found)
    if hvd.rank() == 0:
        options.result.write_text(json.dumps(everyone))


def train(megabytes, sliced, batch_size=8, steps=3):
    """Peak memory in bytes above an idle process, and bytes sent per step, of this rank.

    Args:
        megabytes: of the whole model's weights, 10^6 bytes.
        sliced: cut it over all ranks; otherwise it is whole on each.
        batch_size: samples per step.
        steps: of training, after one that is not counted.
    """
    x = np.random.default_rng(0).normal(size=(batch_size, WIDTH)).astype("float32")
    tf.linalg.matmul(x, x, transpose_b=True)  # TensorFlow has started
    hvd.allreduce(tf.zeros(8))
    idle = peak_resident()
    keras.utils.set_random_seed(0)
    pairs = hidden_widths(megabytes)
    if sliced:
        rules = {"up_*": "column", "down_*": "row"}
        model = hvd.slice_layers(lambda: build(pairs), rules)
    else:
        model = build(pairs)
    model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=False)
    model.train_on_batch(x, x)
    before = sent()
    for _ in range(steps):
        model.train_on_batch(x, x)
    n = hvd.size() if sliced else 1
    # Each pair: one all-reduce forward, and one backward but for the first, whose inputs need no gradient.
    message = 2 * (n - 1) / n * batch_size * WIDTH * 4
    return {
        "weights": sum(4 * int(np.prod(v.shape)) for v in model.weights),
        "idle": idle,
        "peak": peak_resident() - idle,
        "bytes per step": (sent() - before) / steps,
        "bytes by the formula": message * (2 * len(pairs) - 1),
    }


def hidden_widths(megabytes):
    """The widths of the hidden layers whose weights are `megabytes` in all."""
    units = round(megabytes * 1e6 / 4 / (2 * WIDTH))
    full, rest = divmod(units, HIDDEN)
    return [HIDDEN] * full + ([rest // 8 * 8] if rest >= 8 else [])


def build(widths):
    inputs = keras.Input((WIDTH,))
    x = inputs
    for i, width in enumerate(widths):
        x = keras.layers.Dense(width, activation="relu", name=f"up_{i}")(x)
        x = keras.layers.Dense(WIDTH, name=f"down_{i}")(x)
    return keras.Model(inputs, x)


def sent():
    found = hvd.traffic().get("slices")
    return found.bytes if found else 0


if __name__ == "__main__":
    main()
