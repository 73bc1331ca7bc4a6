"""What optimizers that exchange gradients are told of `fit`: that it begins, an epoch, and that it ends."""

from __future__ import annotations

from typing import Any

import keras

from hvdext.common.log import warn
from hvdext.gradients.apply_hook import ApplyHook, hooks_of
from hvdext.gradients.fit_meeting import FitMeeting
from hvdext.keras_tools.batch_norm import own_statistics
from hvdext.keras_tools.models import optimizers_of


def told_by_fit(model: keras.Model, x: Any) -> keras.callbacks.Callback | None:
    """The callback for a `fit` of `model` on `x`; None if none of its optimizers exchanges gradients."""
    hooks = hooks_in(model)
    return _Teller(model, hooks, x) if hooks else None


def hooks_in(model: keras.Model) -> list[ApplyHook]:
    """The hooks of all optimizers that train `model`."""
    return [hook for optimizer in optimizers_of(model) for hook in hooks_of(optimizer)]


class _Teller(keras.callbacks.Callback):
    """After the user's callbacks, which may have loaded weights or another epoch."""

    def __init__(self, model: keras.Model, hooks: list[ApplyHook], x: Any):
        super().__init__()
        self._hooks = hooks
        self._meeting = FitMeeting(model, hooks, x)

    def on_train_begin(self, logs=None):
        params = self.params or {}
        self._meeting.begins(params.get("epochs"), params.get("steps"))
        for hook in self._hooks:
            hook.training_begins()
        _tell_of_statistics(self.model, self._hooks[0].exchange.comm())

    def on_epoch_begin(self, epoch, logs=None):
        self._meeting.at_epoch(epoch)
        for hook in self._hooks:
            hook.epoch_begins()

    def on_train_end(self, logs=None):
        self._meeting.ends()


def _tell_of_statistics(model, comm):
    names = own_statistics(model) if comm.size > 1 and comm.rank == 0 else []
    if names:
        warn(
            f"BatchNormalization layers {names} normalize by each rank's own batch, one process does by the "
            "whole one: hvd.SyncBatchNormalization in their place takes all ranks' batches together."
        )
