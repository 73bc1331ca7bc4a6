"""How many samples a model has been trained or tested on: Keras does not tell its callbacks."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.models import retrace
from hvdext.keras_tools.train_step import around


class SampleCounter:
    """Counts the rows of each batch that `model.fit` and `train_on_batch` train on, or those of tests.

    The count is a variable that the training step itself adds to, so that it is right with
    `steps_per_execution`, uneven last batches and `run_eagerly`, and costs no wait. Several users share one
    counter per model and kind of step. While at least one holds it, that step of the model is wrapped.

        counter = SampleCounter.of(model)
        counter.acquire()   # at the latest in a callback's `set_model`
        counter.total()     # rows so far, in all trainings
        counter.release()

    Get it with `SampleCounter.of(model)`.
    """

    def __init__(self, model, kind: str):
        self._kind = kind
        # Not the model itself: the table of counters would keep it alive.
        self._model = weakref.ref(model)
        self._rows = tf.Variable(0, dtype=tf.int64, trainable=False, name="samples")
        self._users = 0
        self._is_counting = False  # within a step that counts
        self._counts_in: weakref.ref | None = None  # a function of Keras' that was made to count
        self._take_off: Callable[[], None] = lambda: None

    @staticmethod
    def of(model, kind: str = "train") -> SampleCounter:
        """The counter of what `model` does in its steps of one kind ("train" or "test"), always the same."""
        with _lock:
            counters = _counters.setdefault(model, {})
            if kind not in counters:
                counters[kind] = SampleCounter(model, kind)
            return counters[kind]

    def acquire(self) -> None:
        """Counts from now on, until as many have called `release`."""
        self._users += 1
        if self._users > 1:
            return
        model: Any = self._model()
        self._take_off = around(model, self._counting, self._kind)
        made = getattr(model, f"{self._kind}_function")
        if made is not None and (self._counts_in is None or self._counts_in() is not made):
            retrace(model, self._kind)

    def release(self) -> None:
        """Takes the wrapper off when the last user has left."""
        self._users -= 1
        if self._users > 0:
            return
        model: Any = self._model()
        made = getattr(model, f"{self._kind}_function")
        # What was traced may stay, since adding to a number nobody reads does no harm: the next `fit` need
        # not trace again.
        self._counts_in = None if made is None else weakref.ref(made)
        self._take_off()  # where somebody has wrapped ours it stays inside, and counts once all the same

    @staticmethod
    def is_needed(model, kind: str = "train") -> bool:
        """Whether a step of the user's own decides what Keras' mean of the loss counts."""
        name = f"{kind}_step"
        owners = [next(cls for cls in type(model).__mro__ if name in vars(cls)), *_own(model, name)]
        return any(
            getattr(owner, "__module__", "").partition(".")[0] not in ("keras", "hvdext") for owner in owners
        )

    def total(self) -> int:
        """Rows so far, never less than before."""
        return int(self._rows.numpy())

    def _counting(self, plain):
        @without_autograph
        def step(data):
            if self._is_counting:
                return plain(data)
            self._add(data)
            self._is_counting = True
            try:
                return plain(data)
            finally:
                self._is_counting = False

        return step

    def _add(self, data):
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        first = next(leaf for leaf in keras.tree.flatten(inputs) if leaf is not None)
        # A shape known beforehand depends on no batch, and Keras runs one step more without one.
        with tf.control_dependencies(tf.nest.flatten(first, expand_composites=True)[:1]):
            self._rows.assign_add(tf.cast(tf.shape(first)[0], tf.int64))


_counters: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _own(model, name):
    return [vars(model)[name]] if name in vars(model) else []
