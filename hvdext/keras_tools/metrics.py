"""A model's metrics as Keras keeps them, and what Keras reads of them."""

from __future__ import annotations

from typing import Any

import keras


def loss_tracker(model: keras.Model) -> keras.metrics.Mean | None:
    """The metric that averages the loss over an epoch; None before `compile`."""
    return model._loss_tracker


def compiled_metrics(model: keras.Model) -> Any:
    """The metric that holds those that the model was compiled with; None if there are none."""
    return model._compile_metrics
