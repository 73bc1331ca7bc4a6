"""Puts something around a model's `train_step` or `test_step`, and takes it off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import keras

Step = Callable[[Any], Any]  # a batch of data -> the logs


def around(model: keras.Model, wrapper: Callable[[Step], Any], kind: str = "train") -> Callable[[], None]:
    """Puts `wrapper(step)` in the place of `step`, the model's `train_step` or `test_step`.

    What Keras has made of the step already stays as it is: see `models.retrace`.

    Args:
        model: the model; what is returned does not keep it alive.
        wrapper: takes the step and returns a function that takes the same batch and returns such logs.
        kind: "train" or "test".

    Returns:
        A function that takes the wrapper off again. Where somebody has wrapped the step once more since, it
        does nothing: the wrapper stays inside, and must bear being put around a second time.
    """
    name = f"{kind}_step"
    plain: Any = getattr(model, name)
    was_own_attribute = name in vars(model)
    step = wrapper(plain)
    step.plain = plain  # the only reference that `undo` needs: its own would keep the model alive
    setattr(model, name, step)
    model_of, step_of = weakref.ref(model), weakref.ref(step)

    def undo() -> None:
        wrapped, ours = model_of(), step_of()
        # Compared by identity: what `functools.wraps` makes of the step has its attributes, too.
        if wrapped is None or ours is None or getattr(wrapped, name) is not ours:
            return
        if was_own_attribute:
            setattr(wrapped, name, ours.plain)
        else:
            delattr(wrapped, name)

    return undo


def trace_with(model: keras.Model, wrapper: Callable[[Step], Any]) -> None:
    """Makes the model's train function of `wrapper(step)`, and takes the wrapper off the step at once.

    It is in what `fit` runs until that is made anew.

    Args:
        model: the model.
        wrapper: as for `around`.
    """
    undo = around(model, wrapper)
    try:
        model.make_train_function(force=True)
    finally:
        undo()
