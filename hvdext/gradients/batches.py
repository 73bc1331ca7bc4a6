"""What optimizers that exchange gradients are told of each training step: which batch it is on."""

from __future__ import annotations

from typing import Any

import keras

from hvdext.gradients.train_step import TrainStep, within
from hvdext.gradients.training import hooks_in
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.train_step import Step


def told_of_batches(model: keras.Model, step: Step) -> Step:
    """`step` of a model, of whose batches the optimizers hear that exchange gradients."""

    @without_autograph
    def told(data: Any) -> Any:
        hooks = hooks_in(model)
        if not hooks:
            return step(data)
        with within(_begun(model, hooks, data)):
            return step(data)

    return told


def _begun(model, hooks, data) -> TrainStep:
    weighing = next(
        (hook.weighing for hook in hooks if hook.weighing.weight_by is not None), hooks[0].weighing
    )
    others = [hook.optimizer.name for hook in hooks if hook.weighing.weight_by != weighing.weight_by]
    if others:
        raise ValueError(
            "`weight_by` must be the same for all optimizers of a model. Received: "
            f"weight_by={weighing.described!r} and another for {others}."
        )
    return TrainStep(
        weighing.exchange,
        weighing.weight_by,
        model,
        data,
        is_uneven=any(hook.expects_uneven_batches for hook in hooks),
        is_accumulated=any(hook.accumulator is not None for hook in hooks),
    )
