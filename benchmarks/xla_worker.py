"""One rank of xla.py."""

from __future__ import annotations

import json
import time

import keras
import models
import numpy as np
import tensorflow as tf
from keras import layers
from measuring import take_core, worker_parser

import hvdext as hvd

STEPS = 40  # per measurement
BATCH = 32


def main():
    options = worker_parser().parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    take_core(hvd.local_rank(), hvd.local_size())
    found = {build.__name__: measured(build, options.rounds) for build in (cnn, transformer, lstm)}
    if hvd.rank() == 0:
        options.result.write_text(json.dumps(found))


def measured(build, rounds):
    """Seconds per step of the slowest rank, for each kind and round."""
    kinds = {
        "plain Keras, XLA": trainer(build, keras.optimizers.Adam(), True),
        "hvdext, XLA": trainer(build, hvd.DistributedOptimizer(keras.optimizers.Adam()), True),
        "plain Keras, no XLA": trainer(build, keras.optimizers.Adam(), False),
        "hvdext, no XLA": trainer(build, hvd.DistributedOptimizer(keras.optimizers.Adam()), False),
    }
    found = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for kind, step in kinds.items():
            hvd.barrier()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            seconds = (time.perf_counter() - start) / STEPS
            if number:  # the first round compiles
                found[kind].append(max(hvd.allgather_object(seconds)))
    return found


def trainer(build, optimizer, jit_compile):
    """A function that trains one step."""
    keras.utils.set_random_seed(0)  # the same weights on all ranks
    model, shape = build()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=jit_compile)
    numbers = np.random.default_rng(hvd.rank())
    batch = numbers.random((BATCH, *shape), np.float32), numbers.integers(0, 10, BATCH)
    data = iter(tf.data.Dataset.from_tensors(batch).repeat())
    model.train_on_batch(*batch)
    return lambda: model.train_function(data)


def cnn():
    return models.cnn(), (28, 28, 1)


def transformer():
    x = inputs = keras.Input((32, 64))
    for _ in range(2):
        normal = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 16)(normal, normal)
        wide = layers.Dense(256, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(64)(wide)
    outputs = layers.Dense(10)(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs), (32, 64)


def lstm():
    return keras.Sequential([keras.Input((32, 16)), layers.LSTM(128), layers.Dense(10)]), (32, 16)


if __name__ == "__main__":
    main()
