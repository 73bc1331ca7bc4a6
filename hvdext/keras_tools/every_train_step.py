"""Something around the training step of every model, in `fit` and `train_on_batch`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import keras

from hvdext.keras_tools.train_step import Step, around
from hvdext.keras_tools.xla import compiled_by_hand

Surrounding = Callable[[keras.Model, Step], Step]

_surroundings: list[Surrounding] = []
_compiling: list[Callable[[keras.Model], bool]] = []


def surround_every_train_step(
    surrounding: Surrounding, compiles: Callable[[keras.Model], bool] | None = None
) -> None:
    """From now on Keras makes its train functions of `surrounding(model, step)`; once, however often called.

    Args:
        surrounding: returns a function that takes the same batch and returns the same logs.
        compiles: says of which models it has XLA compile the step by itself, so that Keras does not.
    """
    if not _surroundings:
        keras.Model.make_train_function = _made_with(keras.Model.make_train_function)
    if surrounding not in _surroundings:
        _surroundings.append(surrounding)
        _compiling.extend([compiles] if compiles is not None else [])


def _made_with(keras_make):
    @functools.wraps(keras_make)
    def make_train_function(self, *args, **kwargs) -> Any:
        undo = [around(self, functools.partial(surrounding, self)) for surrounding in _surroundings]
        is_compiled = any(compiles(self) for compiles in _compiling)
        try:
            with compiled_by_hand(self) if is_compiled else contextlib.nullcontext():
                return keras_make(self, *args, **kwargs)
        finally:
            for take_off in reversed(undo):
                take_off()

    return make_train_function
