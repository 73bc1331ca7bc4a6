"""Variables without values: a model's shape and initializers, without its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state

from hvdext.keras_tools.replacing import replace

_WAITING = "uninitialized_variables"  # where Keras notes what it has put off


@contextlib.contextmanager
def without_values() -> Iterator[keras.StatelessScope]:
    """Context in which new Keras variables, in this thread, have a shape and an initializer but no value.

    They never get one by themselves; ask `first_value`, or call `give_value`. A layer that needs values to be
    built, such as `Embedding(weights=...)`, cannot be built here.

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
    if has_value(variable):
        return tf.convert_to_tensor(variable._value)
    return tf.cast(variable._initializer(variable.shape, dtype=variable.dtype), variable.dtype)


def has_value(variable: keras.Variable) -> bool:
    """Whether a variable has a value of its own."""
    return variable._value is not None


def give_value(variable: keras.Variable, value: Any = None) -> None:
    """Makes a variable's value anew, on the device of the surrounding scope; unlike `assign`, which copies.

    Args:
        variable: with or without a value.
        value: of its shape; None: what its initializer makes, for a variable without a value.
    """
    if value is None:
        variable._deferred_initialize()
    else:
        variable._initialize(value)


def take_value(variable: keras.Variable) -> None:
    """Leaves a variable without a value, and its memory free."""
    replace(variable, _value=None)


def rename(variable: keras.Variable, name: str, path: str) -> None:
    """Gives a variable the name and path of another one.

    Args:
        variable: the variable.
        name: what `variable.name` is to be.
        path: what `variable.path` is to be.
    """
    replace(variable, _name=name, _path=path)
