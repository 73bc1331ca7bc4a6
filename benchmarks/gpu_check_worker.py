"""One rank of gpu_check.py."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import keras
import models
import numpy as np
import tensorflow as tf
from keras import layers
from tensorflow.python.eager import context

import hvdext as hvd

TOLERANCE = 1e-3  # of what is computed on a GPU and elsewhere


class Skipped(Exception):
    """Why a check cannot be made here."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("check", choices=sorted(CHECKS))
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args()
    if options.pretend:
        pretend()
    if options.check == "nccl":  # it refuses two ranks of one host on one GPU
        os.environ["NCCL_HOSTID"] = os.environ.get("HOROVOD_RANK", "0")
    hvd.init(process_sets="dynamic")
    try:
        outcome, tells = "passed", CHECKS[options.check](options.pretend)
    except Skipped as reason:
        outcome, tells = "skipped", str(reason)
    if hvd.rank() == 0:
        options.result.write_text(json.dumps({"outcome": outcome, "tells": tells}))
    hvd.barrier()


def pretend():
    """TensorFlow reports a GPU, for which Keras turns on XLA."""
    there = tf.config.list_physical_devices
    gpu = SimpleNamespace(device_type="GPU", name="/physical_device:GPU:0")
    tf.config.list_physical_devices = lambda kind=None: there(kind) + ([gpu] if kind in (None, "GPU") else [])


# -- checks ----------------------------------------------------------------------------------------------


def train(_pretend):
    """The README's example: XLA is on, ranks end alike, variables lie on the GPU."""
    model, losses = trained(keras.optimizers.Adam(1e-3))
    compiled = xla_functions()
    assert model.jit_compile, "Keras has not turned on XLA"
    assert compiled, "XLA has compiled nothing"
    assert losses[-1] < losses[0], losses
    difference = hvd.largest_difference(model.variables)
    assert difference == 0, difference
    where = device_of(model)
    return f"{compiled} functions by XLA; weights on {where}; loss {losses[0]:.3f} to {losses[-1]:.3f}"


def mixed(_pretend):
    """Float16 with a loss scale: an overflow on the last rank skips an update on all."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    model, _ = trained(keras.optimizers.Adam(1e-3), spoilt=True)
    assert hvd.largest_difference(model.variables) == 0
    updates, batches = int(model.optimizer.iterations), 4 * 3
    assert 0 < updates < batches, updates
    assert all(np.isfinite(w).all() for w in model.get_weights())
    return f"{batches - updates} of {batches} updates skipped on all ranks; weights are finite and equal"


def step(is_small):
    """Step time of a large transformer on one rank, over that of plain Keras."""
    width, depth, words = (64, 2, 1000) if is_small else (768, 12, 20_000)
    steps = {
        "plain": stepper(transformer(width, depth, words), keras.optimizers.Adam()),
        "hvdext": stepper(
            transformer(width, depth, words), hvd.DistributedOptimizer(keras.optimizers.Adam())
        ),
    }
    times = {name: [] for name in steps}
    for number in range(6):
        for name, (_, take) in steps.items():
            start = time.perf_counter()
            for _ in range(3):
                take()
            if number:
                times[name].append((time.perf_counter() - start) / 3)
    ratio = statistics.median(a / b for a, b in zip(times["hvdext"], times["plain"], strict=True))
    parameters, plain = steps["plain"][0].count_params(), 1e3 * statistics.median(times["plain"])
    return f"{parameters:,} parameters: {plain:.1f} ms per step of plain Keras, {ratio:.3f} times with hvdext"


def nccl(_pretend):
    """Sums of two ranks through NCCL."""
    if not hvd.nccl_built():
        raise Skipped("the engine is built without NCCL (hvdext build-horovod --with-nccl)")
    for dtype in ("float32", "float16", "float64", "int32"):
        mine = tf.cast(tf.fill([1000], hvd.rank() + 1), dtype)
        np.testing.assert_array_equal(hvd.allreduce(mine, op=hvd.Sum), np.full(1000, 3, dtype))
    return train(False)


def pipeline(_pretend):
    """Three updates of a pipeline against one process."""
    x, y = digits()
    x, y = x[:96], y[:96]
    plan = hvd.plan(network, places=hvd.size())
    keras.utils.set_random_seed(0)
    model = hvd.pipeline(network, plan, microbatches=4)
    model.compile(keras.optimizers.SGD(0.1), loss_of_labels())
    history = model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    keras.utils.set_random_seed(0)
    alone = network()
    alone.compile(keras.optimizers.SGD(0.1), loss_of_labels())
    expected = alone.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    got, want = history.history["loss"][0], expected.history["loss"][0]
    assert abs(got - want) < TOLERANCE, (got, want)
    return f"loss {got:.5f}, of one process {want:.5f}"


def predict(_pretend):
    """Predictions of all ranks against those of one process."""
    x, _ = digits()
    keras.utils.set_random_seed(0)
    model = network()
    got, want = hvd.predict(model, x, verbose=0), model.predict(x, verbose=0)
    if hvd.rank() == 0:
        np.testing.assert_allclose(got, want, atol=TOLERANCE)
    return f"{len(x)} rows"


def serve(_pretend):
    """An answer over HTTP against the model's own."""
    x, _ = digits()
    keras.utils.set_random_seed(0)
    model = network()
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        hvdext = Path(sys.executable).with_name("hvdext")
        program = [hvdext, "serve", Path(folder, "model.keras"), "--port", "0"]
        server = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            address = address_of(server)
            body = json.dumps({"instances": x[:4].tolist()}).encode()
            with urllib.request.urlopen(f"{address}/v1/models/model:predict", body, timeout=60) as answer:
                got = json.loads(answer.read())["predictions"]
        finally:
            server.terminate()
            server.wait(30)
    np.testing.assert_allclose(got, model.predict(x[:4], verbose=0), atol=TOLERANCE)
    return f"4 rows from {address}"


CHECKS = {
    "train": train,
    "mixed": mixed,
    "step": step,
    "nccl": nccl,
    "pipeline": pipeline,
    "predict": predict,
    "serve": serve,
}


# -- parts -----------------------------------------------------------------------------------------------


def digits():
    """Images as float32 of shape (384, 8, 8, 1), and labels: some of what scikit-learn ships."""
    (x, y), _ = models.datasets.load("digits")
    return x[:384], y[:384]


def network():
    hidden = [layers.Conv2D(16, 3, activation="relu"), layers.Flatten(), layers.Dense(64, activation="relu")]
    return keras.Sequential([keras.Input((8, 8, 1)), *hidden, layers.Dense(10, dtype="float32")])


def loss_of_labels():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def trained(optimizer, spoilt=False):
    """The model and its losses after the README's training; `spoilt`: a batch of the last rank overflows."""
    x, y = digits()
    if spoilt and hvd.rank() == hvd.size() - 1:
        x = x.copy()
        x[hvd.rank()] = 60_000  # beyond float16 once layers have summed it
    model = network()
    model.compile(hvd.DistributedOptimizer(optimizer), loss_of_labels(), metrics=["accuracy"])
    mine = slice(hvd.rank(), None, hvd.size())
    history = model.fit(
        x[mine],
        y[mine],
        batch_size=128 // hvd.size(),
        epochs=4,
        shuffle=False,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()],
        verbose=0,
    )
    return model, history.history["loss"]


def xla_functions():
    """How many functions of this process XLA compiles."""
    known = context.context()
    return sum(known.get_function_def(name).attr["_XlaMustCompile"].b for name in known.list_function_names())


def device_of(model):
    return model.trainable_variables[0].value.device.rpartition("/device:")[2]


def transformer(width, depth, words):
    """A decoder without a mask; 768, 12 and 20,000 make 116 million parameters."""
    tokens = keras.Input((128,), dtype="int32")
    x = layers.Embedding(words, width)(tokens)
    for _ in range(depth):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(width // 64, 64)(normal, normal)
        wide = layers.Dense(4 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(wide)
    return keras.Model(tokens, layers.Dense(words, dtype="float32")(x))


def stepper(model, optimizer):
    """The model, and a function that trains one step on a batch of 4."""
    model.compile(optimizer, loss_of_labels())
    tokens = np.random.default_rng(0).integers(0, model.output_shape[-1], (4, 128))
    model.train_on_batch(tokens, tokens)
    return model, lambda: model.train_on_batch(tokens, tokens)


def address_of(server):
    """Where a server says that it is, once it is ready."""
    address = None
    for line in server.stdout:
        address = address or next(iter(re.findall(r"http://[\w.]+:\d+", line)), None)
        if "ready" in line and address:
            return address
    raise RuntimeError(f"`hvdext serve` has ended with {server.wait()} before it was ready")


if __name__ == "__main__":
    main()
