"""What the stages of a pipeline tell each other after a batch: losses, overflows, metrics, predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.gradients.train_step import current_step
from hvdext.keras_tools.functional import outputs_like
from hvdext.keras_tools.metrics import compiled_metrics, loss_tracker
from hvdext.keras_tools.training import compiled_loss, reductions_of
from hvdext.placement.pipeline.batch_check import COUNT, checks_of, with_rows_of
from hvdext.placement.pipeline.messages import Spec, pack, unpack


@dataclass(frozen=True)
class Results:
    """The message that all ranks of a pipeline exchange once per batch, and that of predictions.

    Attributes:
        comm: the pipeline's ranks.
        name: the pipeline's, part of the message's name.
        is_last: whether the last stage is here, whose metrics become everybody's.
    """

    comm: Communicator
    name: str
    is_last: bool

    def share(
        self, metrics: Sequence, losses: list, overflow: tf.Tensor | None, marks: tf.Tensor, transfers: list
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Sums losses and overflows over the stages; the last rank's metrics become everybody's.

        Called by all ranks once per batch.

        Args:
            metrics: the variables of this rank's metrics.
            losses: of this rank's stages.
            overflow: 1 if its gradients have overflowed, or None.
            marks: of its batch, from `marks_of`; nothing is told before they are there.
            transfers: of its other messages. They end before the marks are compared: a rank that fails
                between two messages would leave its neighbours waiting.

        Returns:
            The batch's loss and the number of stages whose gradients have overflowed.
        """
        # float64 holds every metric's float32 and count exactly.
        zero = tf.zeros([], tf.float64)
        loss = tf.add_n([tf.cast(value, tf.float64) for value in losses]) if losses else zero
        overflow = zero if overflow is None else tf.cast(overflow, tf.float64)
        states = [tf.reshape(tf.cast(v.value, tf.float64), [-1]) for v in metrics]
        if not self.is_last:
            states = [tf.zeros_like(state) for state in states]
        ranks = self.comm.size
        my_marks = tf.reshape(tf.one_hot(self.comm.rank, ranks, dtype=tf.float64)[:, None] * marks, [-1])
        mine = tf.concat([tf.stack([loss, overflow]), my_marks, *states], 0)
        (total,) = self.comm.allreduce([mine], f"hvdext.pipeline.{self.name}.results")
        sums, all_marks, values = tf.split(total, [2, ranks * COUNT, -1])
        if metrics and not self.is_last:
            parts = tf.split(values, [math.prod(v.shape) for v in metrics])
            for variable, part in zip(metrics, parts, strict=True):
                variable.assign(tf.reshape(tf.cast(part, variable.dtype), variable.shape))
        with tf.control_dependencies(transfers):
            checks = checks_of(tf.reshape(all_marks, [ranks, COUNT]))
        with tf.control_dependencies(checks):
            return tf.identity(tf.cast(sums[0], keras.config.floatx())), sums[1]

    def spread(self, function: keras.Function, outputs: Sequence, rows: tf.Tensor) -> Any:
        """The model's outputs for a batch, on all ranks, which call it together.

        Args:
            function: the whole model's graph.
            outputs: one for each of the graph's, where the last stage is; elsewhere of no use.
            rows: of the batch; nothing is told before they are there.
        """
        specs = [Spec(tuple(t.shape), tf.as_dtype(t.dtype)) for t in function.outputs]
        message = pack(outputs, specs) if self.is_last else tf.zeros([0], tf.uint8)
        if self.comm.size > 1:
            with tf.control_dependencies([rows]):
                message = tf.identity(message)
            message = self.comm.allgather(message, f"hvdext.pipeline.{self.name}.predictions")
        return outputs_like(function, unpack(message, specs))


def loss_of(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> tf.Tensor:
    """The loss of some samples, without penalties.

    Args:
        model: compiled.
        y: targets.
        y_pred: the model's outputs, whose rows count.
        sample_weight: or None.
    """
    return compiled_loss(model)(with_rows_of(y, y_pred), y_pred, with_rows_of(sample_weight, y_pred))


def update_metrics(model: keras.Model, y: Any, y_pred: Any, sample_weight: Any) -> None:
    """Adds a batch to the metrics.

    Args:
        model: compiled.
        y: targets.
        y_pred: the model's outputs, whose rows count.
        sample_weight: or None.
    """
    metrics = compiled_metrics(model)
    if metrics is not None:
        y, sample_weight = with_rows_of(y, y_pred), with_rows_of(sample_weight, y_pred)
        metrics.update_state(y, y_pred, sample_weight)


def track_loss(model: keras.Model, loss: tf.Tensor, rows: tf.Tensor) -> None:
    """Adds a batch to the mean loss.

    Args:
        model: compiled.
        loss: of the batch.
        rows: of the batch.
    """
    tracker = loss_tracker(model)
    assert tracker is not None, "a model that is compiled has one"
    tracker.update_state(loss, sample_weight=rows)


def metric_variables(model: keras.Model) -> list:
    """The variables of a compiled model's metrics, those of its losses first."""
    compiled = compiled_metrics(model)
    metrics = [*compiled_loss(model).metrics, *([compiled] if compiled else [])]
    return [variable for metric in metrics for variable in metric.variables]


def shares(model: keras.Model, sample_weight: Any, weights: Sequence) -> list:
    """What each micro-batch's loss counts for; called where the last stage is.

    Means over samples have 1/m each and sums 1. A mean that divides by the sum of its weights counts by
    them.

    Args:
        model: compiled, with built losses.
        sample_weight: of the batch, or None.
        weights: those of its micro-batches.

    Raises:
        ValueError: if the losses' reductions, or the weights, cannot be put together of micro-batches.
    """
    kinds = reductions_of(model)
    sums = [kind for kind in kinds if kind == "sum"]
    if sums and len(kinds) > 1:
        raise ValueError(
            "`loss` must have one kind of reduction for all outputs of a pipeline. "
            f"Received: {sorted(kinds)}."
        )
    if sums:
        return [1.0] * len(weights)
    if "mean_with_sample_weight" in kinds and sample_weight is not None:
        if keras.tree.is_nested(sample_weight) or len(kinds) > 1:
            raise ValueError(
                "`sample_weight` must be one array, and the reduction that of all outputs, with "
                f"reduction='mean_with_sample_weight'. Received: reductions {sorted(kinds)}."
            )
        total = tf.reduce_sum(tf.cast(sample_weight, tf.float32))
        step = current_step()
        if step is not None:  # other pipelines train the same model on other data
            total = step.mean_over_ranks(total)
        return [tf.math.divide_no_nan(tf.reduce_sum(tf.cast(w, tf.float32)), total) for w in weights]
    return [1 / len(weights)] * len(weights)
