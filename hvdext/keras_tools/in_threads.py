"""Keras in several threads at once."""

from __future__ import annotations

import threading

import keras
from keras.src.models import functional
from keras.src.models import model as models

_lock = threading.RLock()


def make_functional_in_turn() -> None:
    """From now on one thread at a time gives a subclass of `keras.Model` its place above functional models.

    Keras does so when the first model of the class is made from inputs and outputs. Two threads that both
    find it not done yet would do it twice, which is an error. The second time, nothing changes.
    """
    keras_inject = models.inject_functional_model_class
    if getattr(keras_inject, "is_in_turn", False):
        return

    def inject(cls: type) -> type:
        with _lock:
            is_done = cls is not keras.Model and issubclass(cls, functional.Functional)
            return cls if is_done else keras_inject(cls)

    inject.is_in_turn = True  # type: ignore[attr-defined]
    models.inject_functional_model_class = inject
