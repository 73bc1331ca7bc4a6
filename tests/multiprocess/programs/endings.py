"""Programs of ranks that end badly; each is a launch of its own."""

from __future__ import annotations

import sys
import time

import keras
import numpy as np

import hvdext as hvd


class _AtThirdStep(keras.callbacks.Callback):
    """Does `action` on rank 1 before the third step."""

    def __init__(self, action):
        super().__init__()
        self._action = action

    def on_train_batch_begin(self, batch, logs=None):
        if hvd.rank() == 1 and batch == 2:
            self._action()


def _fit(action):
    hvd.init()
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="out")])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name="sgd")), "mse")
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), _AtThirdStep(action)]
    model.fit(np.ones((40, 3)), np.ones((40, 1)), 4, verbose=0, callbacks=callbacks)


def raising():
    """Rank 1 raises in its third step; it says when."""

    def fail():
        print(f"RAISED AT {time.time()}", file=sys.stderr, flush=True)
        raise ZeroDivisionError("the culprit's own error")

    _fit(fail)


def sleeping():
    """Rank 1 never arrives at its third step."""
    _fit(lambda: time.sleep(600))
