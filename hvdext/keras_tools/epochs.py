"""The epoch that a training begins with."""

from __future__ import annotations

import keras


def initial_epoch_of(model: keras.Model) -> int | None:
    """The epoch that a callback wants `fit` to begin with; None: that which `fit` was told."""
    return model._initial_epoch


def begin_with_epoch(model: keras.Model, epoch: int | None) -> None:
    """Has `fit` begin with an epoch, counted from 0; for a callback's `on_train_begin`.

    Args:
        model: the model that is about to be trained.
        epoch: as `initial_epoch_of` returns it.
    """
    model._initial_epoch = epoch
