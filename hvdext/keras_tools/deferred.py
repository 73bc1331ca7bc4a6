"""Variables without values: a model's shape and initializers, without its memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state

from hvdext.keras_tools.replacing import replace

_WAITING = "uninitialized_variables"  # where Keras notes what it has put off
_RANDOM = "global_seed_generator"  # what layers draw from that have no generator of their own
_SCOPE = "stateless_scope"  # and what assignments go into


class _Building(threading.local):
    """The scope in which this thread builds without values; None outside."""

    scope: keras.StatelessScope | None = None


_building = _Building()
_lock = threading.Lock()
_builders = 0  # threads that build without values


@contextlib.contextmanager
def without_values() -> Iterator[keras.StatelessScope]:
    """Context in which new Keras variables, in this thread, have a shape and an initializer but no value.

    They never get one by themselves; ask `first_value`, or call `give_value`. Of a variable that is made of a
    value, such as an optimizer's, this is what an initializer would have made. `keras.utils.clear_session`
    within does not end the context.

    Yields:
        What holds the values that are assigned within, such as weights from a file.
    """
    before = global_state.get_global_attribute(_WAITING, [])
    global_state.set_global_attribute(_WAITING, [])
    outer = _building.scope
    try:
        with _as_here(), keras.StatelessScope(initialize_variables=False) as scope:
            _building.scope = scope
            yield scope
    finally:
        _building.scope = outer
        global_state.set_global_attribute(_WAITING, before)
        generator = global_state.get_global_attribute(_RANDOM)
        if generator is not None and not has_value(generator.state):
            global_state.set_global_attribute(_RANDOM, None)  # made within: Keras makes another one


@contextlib.contextmanager
def _as_here() -> Iterator[None]:
    """While a thread is in here, Keras asks this file what it would forget or refuse within `without_values`.

    `clear_session` throws the scope away with all that Keras keeps for threads, and variables would be
    allocated again. Other threads have Keras as it is.
    """
    global _builders
    with _lock:
        _builders += 1
        if _builders == 1:
            _kept.update(ask=global_state.get_global_attribute, make=keras.Variable.__init__)
            replace(global_state, get_global_attribute=_ask)
            replace(keras.Variable, __init__=_make)
    try:
        yield
    finally:
        with _lock:
            _builders -= 1
            if _builders == 0:
                replace(global_state, get_global_attribute=_kept["ask"])
                replace(keras.Variable, __init__=_kept["make"])


_kept: dict[str, Any] = {}  # of Keras, while it is replaced


def _ask(name, default=None, set_to_default=False):
    found = _kept["ask"](name, default, set_to_default)
    return _building.scope if found is None and name == _SCOPE else found


def _make(self, initializer, shape=None, dtype=None, **kwargs):
    if _building.scope is not None and not callable(initializer) and not isinstance(initializer, str):
        value = keras.ops.convert_to_tensor(initializer, dtype=dtype)
        shape, dtype = value.shape, dtype or keras.backend.standardize_dtype(value.dtype)
        initializer = lambda shape, dtype=None: value  # noqa: E731
    _kept["make"](self, initializer, shape, dtype, **kwargs)


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
