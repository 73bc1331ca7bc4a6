"""How long the steps of a `fit` take."""

from __future__ import annotations

import time

import keras


class Clock(keras.callbacks.Callback):
    """Notes when each step, and what the callbacks before this one do after it, has ended.

    The time of the whole `fit` would not do: at its end TensorFlow's input pipeline waits for a thread that
    wakes up after 10, 20, 40, ... ms, so that a fit may take up to twice as long as its steps.
    """

    def on_train_begin(self, logs=None):
        self.times = []

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())

    def seconds_per_step(self, warmup):
        """The mean of the steps after the first `warmup`, of which there is at least one."""
        return (self.times[-1] - self.times[warmup - 1]) / (len(self.times) - warmup)
