"""What optimizers that exchange gradients are told of training: that it begins, which epoch, which batch."""

from __future__ import annotations

from typing import Any

import keras

from hvdext.gradients.apply_hook import ApplyHook, hooks_of
from hvdext.gradients.train_step import TrainStep, within
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.models import optimizers_of
from hvdext.keras_tools.train_step import Step


def told_by_fit(model: keras.Model) -> keras.callbacks.Callback | None:
    """The callback for a `fit` of `model`; None if none of its optimizers exchanges gradients."""
    hooks = _hooks_in(model)
    return _Teller(hooks) if hooks else None


def told_of_batches(model: keras.Model, step: Step) -> Step:
    """`step` of a model, of whose batches the optimizers hear that exchange gradients."""

    @without_autograph
    def told(data: Any) -> Any:
        hooks = _hooks_in(model)
        if not hooks:
            return step(data)
        with within(_begun(model, hooks, data)):
            return step(data)

    return told


def _hooks_in(model):
    return [hook for optimizer in optimizers_of(model) for hook in hooks_of(optimizer)]


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


class _Teller(keras.callbacks.Callback):
    """After the user's callbacks, which may have loaded weights or another epoch."""

    def __init__(self, hooks: list[ApplyHook]):
        super().__init__()
        self._hooks = hooks

    def on_train_begin(self, logs=None):
        for hook in self._hooks:
            hook.training_begins()

    def on_epoch_begin(self, epoch, logs=None):
        for hook in self._hooks:
            hook.epoch_begins(epoch)
