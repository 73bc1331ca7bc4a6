"""What optimizers that exchange gradients are told of each training step: which batch it is on."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from hvdext.gradients.training import hooks_in
from hvdext.gradients.weighing import TrainStep, within
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.models import added_losses
from hvdext.keras_tools.train_step import Step
from hvdext.keras_tools.training import is_one_loss


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
    rows = _rows_of(data)
    return TrainStep(
        weighing,
        is_uneven=any(hook.expects_uneven_batches for hook in hooks),
        is_accumulated=any(hook.accumulator is not None for hook in hooks),
        is_one_mean=lambda: is_one_loss(model) and not added_losses(model),
        rows=rows,
        count=weighing.count_of(data, rows),
    )


def _rows_of(data) -> tf.Tensor | None:
    """The number of samples in a batch, None where it is nothing with rows."""
    leaves = [leaf for leaf in tf.nest.flatten(data) if tf.is_tensor(leaf) and leaf.shape.rank != 0]
    if not leaves:
        return None
    first = leaves[0]
    return first.nrows() if isinstance(first, tf.RaggedTensor) else tf.shape(first, tf.int64)[0]
