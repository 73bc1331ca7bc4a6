"""One rank of guards.py."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import keras
import models
import numpy as np
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.current import current
from hvdext.comm.guards import Guards
from hvdext.gradients import exchange

BATCH = 32
COPIES = ("bare", "digest", "looks at each", "bare again")


class WithoutDigest(exchange.GradientExchange):
    """Buckets carry nothing but gradients."""

    def _reduce(self, comm, result, variables, members, name, pattern, rows):
        tensors = [exchange._dense(result[i], variables[i]) for i in members]
        combined = self._combined(comm, tensors, name)
        for i, tensor in zip(members, combined, strict=True):
            result[i] = tensor
        return combined[0]


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    keras.utils.set_random_seed(0)  # all ranks start alike
    copies = {name: compiled(options.model, digest="bare" not in name) for name in COPIES}
    batch = one_batch(copies["bare"])
    times = {name: [] for name in copies}
    for round_ in range(options.rounds + 1):
        turn = round_ % len(COPIES)
        for name in (*COPIES[turn:], *COPIES[:turn]):
            Guards(check_every=1 if name == "looks at each" else 0).keep_for(current())
            times[name].append(per_step(copies[name], batch, options.steps))
    if hvd.rank() == 0:
        options.result.write_text(json.dumps({name: all_[1:] for name, all_ in times.items()}))


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["420k", "10M"], required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return parser.parse_args()


def compiled(which, digest):
    if which == "420k":
        model = models.cnn()
    else:
        layers = [keras.layers.Dense(1280, activation="relu") for _ in range(6)]
        model = keras.Sequential([keras.Input((1280,)), *layers, keras.layers.Dense(10)])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.01, momentum=0.9))
    if not digest:
        optimizer._hvdext_hook.exchange.__class__ = WithoutDigest
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def one_batch(model):
    """The same batch again and again, without end."""
    generator = np.random.default_rng(0)
    inputs = generator.random((BATCH, *model.input_shape[1:]), np.float32)
    targets = generator.integers(0, 10, BATCH)
    return tf.data.Dataset.from_tensors((inputs, targets)).cache().repeat()


def per_step(model, batch, steps):
    """Seconds of the clock and of this rank's processor, once all ranks have begun."""
    times = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            hvd.barrier()
            times.append((time.perf_counter(), time.process_time()))

        def on_epoch_end(self, epoch, logs=None):
            times.append((time.perf_counter(), time.process_time()))

    model.fit(batch, steps_per_epoch=steps, epochs=1, callbacks=[Clock()], verbose=0)
    (began, computed), (ended, then_computed) = times
    return (ended - began) / steps, (then_computed - computed) / steps


if __name__ == "__main__":
    main()
