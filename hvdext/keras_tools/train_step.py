"""Puts something around a model's `train_step`, and takes it off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

Step = Callable[[Any], Any]  # a batch of data -> the logs


def around(model: keras.Model, wrapper: Callable[[Step], Step]) -> Callable[[], None]:
    """Puts `wrapper(step)` in the place of `step`, the model's `train_step`.

    Args:
        model: the model.
        wrapper: takes the step and returns a function that takes the same batch and returns such logs.

    Returns:
        A function that takes the wrapper off again, unless somebody has wrapped the step once more since.
    """
    plain, was_own_attribute = model.train_step, "train_step" in vars(model)
    step = wrapper(plain)
    model.train_step = step

    def undo() -> None:
        if model.train_step is not step:
            return
        if was_own_attribute:
            model.train_step = plain
        else:
            del model.train_step

    return undo
