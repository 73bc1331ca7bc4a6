"""What train_sync.py and train_async.py share: the options, a rank that is slow, and the table at the end."""

from __future__ import annotations

import argparse
import time

import keras
import numpy as np

import hvdext as hvd


def parse_arguments(description):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--learning-rate", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow-rank", type=int, default=1)
    parser.add_argument(
        "--slow-factor", type=float, default=2, help="how often as long as its own a step takes"
    )
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow threads per rank; 0: its default")
    return parser.parse_args()


def seconds_per_step(model, images, labels, batch_size, steps=30):
    """What a training step of this rank takes on its own, while all ranks are at it; the median of some."""
    weights = model.get_weights()
    model.compile(keras.optimizers.Adam(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ends = []
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    hvd.barrier()
    needed = np.resize(np.arange(len(images)), steps * batch_size)
    model.fit(images[needed], labels[needed], batch_size, callbacks=[note], verbose=0)
    model.set_weights(weights)
    return float(np.median(np.diff(ends)))


class Load(keras.callbacks.Callback):
    """Counts and times the steps of this rank, and makes one rank slow.

    The clock starts when all ranks have compiled and made their first step.

    Args:
        pause: seconds that this rank sleeps after each step.
    """

    def __init__(self, pause):
        super().__init__()
        self._pause = pause
        self.steps, self.slept, self.begin, self.end, self.computed = 0, 0.0, 0.0, 0.0, 0.0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == 1:
            hvd.barrier()
            self.begin, self._computed_before = time.perf_counter(), time.process_time()
            return
        begin = time.perf_counter()
        time.sleep(self._pause)
        self.end, self.computed = time.perf_counter(), time.process_time() - self._computed_before
        self.slept += (self.end - begin) if self._pause else 0.0


def print_table(load, samples, batch_size, waited=0.0, staleness=()):
    """Prints what each rank has done, and all together; every rank must call it.

    Args:
        load: the rank's `Load`.
        samples: on which this rank has trained.
        batch_size: of its first step, which the clock leaves out.
        waited: seconds that this rank has waited for batches.
        staleness: of this rank's exchanges, in steps.
    """
    # Since the clock counts this process's work on its processor, what is left is neither work nor sleep.
    idle = max(0.0, load.end - load.begin - load.computed - load.slept)
    stale = (float(np.mean(staleness)), max(staleness)) if staleness else (0.0, 0)
    mine = (samples, load.steps, load.end - load.begin, load.computed, load.slept, idle, waited, *stale)
    rows = hvd.allgather_object(mine)
    if hvd.rank() != 0:
        return
    print("rank  samples  steps  seconds  computing  slowed   idle  for data  staleness: mean   max")
    for rank, (samples, steps, seconds, computed, slept, idle, waited, mean, most) in enumerate(rows):
        print(
            f"{rank:4}  {samples:7}  {steps:5}  {seconds:7.2f}  {computed:9.2f}  {slept:6.2f}  {idle:5.2f}"
            f"  {waited:8.2f}  {mean:15.2f}  {most:4}"
        )
    samples, steps = sum(row[0] for row in rows), sum(row[1] for row in rows)
    seconds = max(row[2] for row in rows)
    timed = samples - batch_size * len(rows)
    print(f"all: {samples} samples in {steps} steps; {timed / seconds:.0f} samples/s")
