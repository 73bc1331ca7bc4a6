"""Variables without values: a model's shape and initializers, without its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf
from keras.src.backend.common import global_state

_WAITING = "uninitialized_variables"  # where Keras notes what it has put off


@contextlib.contextmanager
def without_values() -> Iterator[keras.StatelessScope]:
    """Context in which new Keras variables, in this thread, have a shape and an initializer but no value.

    They never get one by themselves; ask `first_value`. A layer that needs values to be built, such as
    `Embedding(weights=...)`, cannot be built here.

    Yields:
        What holds the values that are assigned within, such as weights from a file.
    """
    before = global_state.get_global_attribute(_WAITING, [])
    global_state.set_global_attribute(_WAITING, [])
    try:
        with keras.StatelessScope(initialize_variables=False) as scope:
            yield scope
    finally:
        global_state.set_global_attribute(_WAITING, before)


def first_value(variable: keras.Variable, scope: keras.StatelessScope) -> tf.Tensor:
    """The value of a variable; of one without, what `scope` holds, or its initializer makes."""
    assigned = scope.get_current_value(variable)
    if assigned is not None:
        return assigned
    if variable._value is not None:
        return tf.convert_to_tensor(variable._value)
    return tf.cast(variable._initializer(variable.shape, dtype=variable.dtype), variable.dtype)
