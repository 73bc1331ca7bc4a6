"""The one place that puts hvdext in front of the `apply` of Keras' optimizer classes.

    Keras' training step -> exchange over ranks -> slices: norms, overflow, same samples -> Keras' own apply

An optimizer gets its exchange as a hook on the object (`hvdext.gradients.apply_hook`). Two things must sit
on a class, since the optimizer is made out of our sight: the exchange in front of the `LossScaleOptimizer`
that `model.compile` makes, and what an optimizer of cut layers must know, whichever optimizer that will be.
Each is a *stage*, put there when it is first needed: who only imports hvdext has an untouched Keras.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hvdext.keras_tools.autograph import without_autograph

# The first is the outermost: norms are those of gradients that have been combined.
ORDER = ("exchange", "slices")

Proceed = Callable[[Any, Any], None]  # (gradients, trainable variables) -> the next stage, in the end Keras
Stage = Callable[[Any, Any, Any, Proceed], None]  # (optimizer, gradients, trainable variables, proceed)

_stages: dict[type, dict[str, Stage]] = {}


def put_before(cls: type, name: str, stage: Stage) -> None:
    """From now on `stage` sees what optimizers of class `cls` are to apply; the second time, nothing changes.

    Args:
        cls: `keras.optimizers.Optimizer` or `keras.optimizers.LossScaleOptimizer`.
        name: the stage's place in `ORDER`.
        stage: calls `proceed(gradients, trainable_variables)`, or does without.
    """
    assert name in ORDER, name
    if cls not in _stages:
        _stages[cls] = {}
        cls.apply = _entrance(cls.apply, _stages[cls])  # type: ignore[attr-defined]
    _stages[cls][name] = stage


def _entrance(keras_apply, stages):
    @functools.wraps(keras_apply)
    @without_autograph
    def apply(self, grads, trainable_variables=None):
        def proceed(place, grads, trainable_variables):
            if place == len(ORDER):
                keras_apply(self, grads, trainable_variables)
                return
            following = functools.partial(proceed, place + 1)
            stage = stages.get(ORDER[place])
            if stage is None:
                following(grads, trainable_variables)
            else:
                stage(self, grads, trainable_variables, following)

        proceed(0, grads, trainable_variables)

    return apply
