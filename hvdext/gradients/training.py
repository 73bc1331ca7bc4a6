"""What optimizers that exchange gradients are told of `fit`: that it begins, and which epoch."""

from __future__ import annotations

import keras

from hvdext.gradients.apply_hook import ApplyHook, hooks_of
from hvdext.keras_tools.models import optimizers_of


def told_by_fit(model: keras.Model) -> keras.callbacks.Callback | None:
    """The callback for a `fit` of `model`; None if none of its optimizers exchanges gradients."""
    hooks = [hook for optimizer in optimizers_of(model) for hook in hooks_of(optimizer)]
    return _Teller(hooks) if hooks else None


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
