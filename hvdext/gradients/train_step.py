"""One training step of a model: what its losses are divided by, and so what its gradients count for."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.communicator import Communicator
from hvdext.comm.once import warn_once
from hvdext.gradients.exchange import GradientExchange
from hvdext.keras_tools.loss_reduction import Reduction, listening
from hvdext.keras_tools.models import added_losses
from hvdext.keras_tools.training import loss_is_keras_s, number_of_losses

SAMPLES = "samples"
WeightBy = str | Callable[[Any, Any, Any], Any] | None

_OWN = (
    "A loss function returns one number for the whole batch, of which nobody knows what it was divided by: "
    "ranks average these as if all had divided by the same. If it is a mean over what a mask leaves, or over "
    "weights, say what it divides by: hvd.DistributedOptimizer(..., weight_by=lambda x, y, sample_weight: "
    "...); or return the losses of the single samples or tokens. weight_by='samples' if it is a mean over "
    "the samples."
)
_UNEVEN = (
    "Several losses, one of them under a mask, are averaged over ranks that may have different numbers of "
    "batches as if all had divided by the same: give weight_by=... of hvd.DistributedOptimizer a function."
)


class TrainStep:
    """One training step, on one batch.

    Args:
        exchange: of the gradients it makes.
        weight_by: as for `hvd.DistributedOptimizer`.
        model: whose step it is.
        data: the batch, as Keras hands it to `train_step`.
        is_uneven: whether ranks may have different numbers of batches, and so meet in no loss.
        is_accumulated: whether micro-batches are put together.

    Attributes:
        count: what all of the loss is divided by, a float64 scalar; None: the same on all ranks.

    Raises:
        ValueError: if `weight_by` does not fit the batch, or gives something else than one number.
    """

    def __init__(
        self,
        exchange: GradientExchange,
        weight_by: WeightBy,
        model: keras.Model,
        data: Any,
        *,
        is_uneven: bool,
        is_accumulated: bool,
    ):
        self._exchange = exchange
        self._weight_by = weight_by
        self._model = model
        self._is_in_parts = getattr(model, "makes_losses_in_parts", False)
        self._is_uneven = is_uneven
        self._is_accumulated = is_accumulated
        self._losses = 0
        self._rows = _rows_of(data)
        self._given = self.count = self._count_of(data)

    @property
    def rows_of_all(self) -> tf.Tensor | None:
        """How many rows the batch has, if all ranks' should have as many; None: they need not."""
        return self._rows if self._weight_by is None and self.count is None and not self._is_uneven else None

    def _count_of(self, data):
        if self._weight_by is None:
            return None
        if callable(self._weight_by):
            if self._is_in_parts:
                raise ValueError(
                    "`weight_by` must be None or 'samples' in a pipeline, whose ranks do not all have the "
                    f"targets. Received: weight_by={self._weight_by!r}."
                )
            count = tf.cast(self._weight_by(*keras.utils.unpack_x_y_sample_weight(data)), tf.float64)
            if count.shape.rank != 0:
                raise ValueError(
                    "`weight_by` must give one number for a batch: what its loss is divided by. "
                    f"Received: the shape {count.shape}."
                )
            return tf.stop_gradient(count)
        if self._rows is None:
            raise ValueError(f"`weight_by='samples'` needs batches with rows. Received: {data!r}.")
        return tf.cast(self._rows, tf.float64)

    def take(self, loss: tf.Tensor, reduction: Reduction) -> tf.Tensor:
        """What is differentiated, and shown, in place of a loss of Keras'.

        All ranks that take part in the step call it for the same losses in the same order.

        Args:
            loss: a scalar, unless nothing has made one number of it.
            reduction: how it came about.
        """
        comm, kind = self._comm(), reduction.kind
        is_alone = comm.size == 1 and not self._is_accumulated
        if is_alone or self._exchange.options.op is ReduceOp.ADASUM or kind == "none":
            return loss
        self._losses += 1
        if kind == "unreduced":  # shown is the mean
            is_summed = loss_is_keras_s(self._model)
            return _shown_as(loss, loss, self._of_sum(loss.dtype)) if is_summed else loss
        if callable(self._weight_by):
            return self._counted_as_said(loss)
        if kind == "own" and self._weight_by is None and comm.size > 1:
            warn_once(self._comm(), _OWN)
        if kind == "sum":
            return loss * self._of_sum(loss.dtype)
        if kind == "own" or (kind in ("plain", "weighted") and self._is_in_parts):
            return loss
        assert reduction.count is not None
        count = tf.cast(reduction.count, tf.float64)
        if kind == "plain":
            # Keras' means of the losses of single outputs count batches, whatever these hold.
            is_one_of_many = number_of_losses(self._model) != 1 and self._weight_by is not None
            return self._of_all(loss, count, weigh=False) if is_one_of_many else loss
        is_all = number_of_losses(self._model) == 1 and self._is_keras_s_alone()
        if is_all:
            self.count = count
        return self._of_all(loss, count, weigh=not is_all)

    def mean_over_ranks(self, value: tf.Tensor) -> tf.Tensor:
        """The mean of the ranks' values, a scalar; all that take part in the step call it."""
        return self._sums([value])[0] / self._comm().size

    def _comm(self) -> Communicator:
        return self._exchange.comm()

    def _is_keras_s_alone(self):
        """Whether only Keras' losses are differentiated, and penalties of weights, alike on all ranks."""
        return loss_is_keras_s(self._model) and not added_losses(self._model)

    def _counted_as_said(self, loss):
        """A mean over what `weight_by` says; what layers add is a mean over samples."""
        are_two = loss_is_keras_s(self._model) and bool(added_losses(self._model)) and not self._is_uneven
        if are_two:
            self.count = None if self._rows is None else tf.cast(self._rows, tf.float64)
        return self._of_all(loss, self._given, weigh=are_two)

    def _of_sum(self, dtype):
        """What a sum over samples is multiplied with: one process would have those of all ranks."""
        comm = self._comm()
        if self._exchange.options.op is ReduceOp.SUM or comm.size == 1:
            return tf.ones([], dtype)
        if self._is_uneven:
            warn_once(self._comm(), _UNEVEN)
            return tf.ones([], dtype)
        factor = tf.constant(float(comm.size), dtype)
        if self.count is not None:
            factor /= tf.cast(self._share(self.count, *self._sums([self.count])), dtype)
        return factor

    def _of_all(self, loss, count, weigh):
        """The loss of all ranks' samples, whose gradient is that of this rank's share.

        Args:
            loss: a mean over this rank's.
            count: over how many; float64.
            weigh: whether the share is weighed here, and not when gradients are combined.
        """
        if self._comm().size == 1:
            return loss
        if self._is_uneven:
            if weigh:
                warn_once(self._comm(), _UNEVEN)
            return loss
        base = tf.ones([], tf.float64) if self.count is None else self.count
        total, counts, bases = self._sums([tf.cast(loss, tf.float64) * count, count, base])
        factor = tf.ones([], tf.float64)
        if weigh:
            factor = tf.math.divide_no_nan(self._share(count, counts), self._share(base, bases))
        mean = tf.math.divide_no_nan(total, counts)
        return _shown_as(loss, tf.cast(mean, loss.dtype), tf.cast(factor, loss.dtype))

    def _share(self, count, total):
        """This rank's share, times the number of ranks."""
        return self._comm().size * tf.math.divide_no_nan(count, total)

    def _sums(self, values):
        """The sums of the ranks' scalars."""
        name = f"hvdext.loss.{self._exchange.name}.{self._losses}"
        (sums,) = self._comm().allreduce([tf.stop_gradient(tf.stack(values))], name)
        return tf.unstack(sums)


@tf.custom_gradient
def _shown_as(loss, value, factor):
    """`value`, with the gradient of `factor * loss`."""
    del loss
    return tf.identity(value), lambda upstream: (upstream * factor, None, None)


def _rows_of(data) -> tf.Tensor | None:
    """The number of samples in a batch, an int64 scalar; None where it is nothing with rows."""
    leaves = [leaf for leaf in tf.nest.flatten(data) if tf.is_tensor(leaf) and leaf.shape.rank != 0]
    if not leaves:
        return None
    first = leaves[0]
    return first.nrows(tf.int64) if isinstance(first, tf.RaggedTensor) else tf.shape(first, tf.int64)[0]


_now: Any = threading.local()


def current_step() -> TrainStep | None:
    """The training step that this thread is making or running; None outside of one."""
    return getattr(_now, "step", None)


@contextlib.contextmanager
def within(step: TrainStep) -> Iterator[None]:
    """While it lasts, losses are told to `step`, and optimizers ask it."""
    before = current_step()
    _now.step = step
    try:
        with listening(step.take):
            yield
    finally:
        _now.step = before
