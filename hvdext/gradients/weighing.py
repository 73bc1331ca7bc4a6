"""What each rank's gradients and losses count for: one process divides by what all ranks' batches hold.

A mean over a rank's own samples, or over those of its tokens that are not masked, is not that rank's share of
the mean over all. With S the sum that a loss makes and c what it divides it by:

    ranks alike      (S_1 / c_1 + ... + S_n / c_n) / n
    one process      (S_1 + ... + S_n) / (c_1 + ... + c_n)  =  mean over ranks of  n c_r / (c_1 + ... + c_n)
                                                               times S_r / c_r

Where all of the loss divides by one count, the gradients are weighed, over all micro-batches of an update at
once. Several losses with counts of their own are weighed each by itself, before the backward pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdext.collectives.reduce_op import ReduceOp
from hvdext.common.log import warn
from hvdext.gradients.exchange import GradientExchange
from hvdext.gradients.tensors import is_overwritten, map_gradient
from hvdext.keras_tools.loss_reduction import Reduction, listening

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


def check_weight_by(weight_by: WeightBy, op: ReduceOp) -> None:
    """Refuses what `weight_by` cannot be.

    Raises:
        ValueError: if it is not None, "samples" or a function, or goes with Adasum.
    """
    if weight_by is not None and weight_by != SAMPLES and not callable(weight_by):
        raise ValueError(
            '`weight_by` must be None, "samples" or a function of (x, y, sample_weight). '
            f"Received: weight_by={weight_by!r}."
        )
    if weight_by is not None and op is ReduceOp.ADASUM:
        raise ValueError(
            "`weight_by` needs op=Average or op=Sum: Adasum is no mean. "
            f"Received: weight_by={weight_by!r} with op={op.value}."
        )


class Weighing:
    """What the gradients of one optimizer count for on this rank.

    Args:
        exchange: theirs.
        weight_by: as for `hvd.DistributedOptimizer`.
    """

    def __init__(self, exchange: GradientExchange, weight_by: WeightBy):
        check_weight_by(weight_by, exchange.options.op)
        self.exchange = exchange
        self.weight_by = weight_by
        self._has_warned: set[str] = set()

    @property
    def described(self) -> str | None:
        """What ranks compare: functions look different on each."""
        return "a function" if callable(self.weight_by) else self.weight_by

    def count_of(self, data: Any, rows: tf.Tensor | None) -> tf.Tensor | None:
        """What a batch counts for, a float64 scalar; None: the same on all ranks, unless a loss says more.

        Args:
            data: the batch, as Keras hands it to `train_step`.
            rows: of the batch, or None.

        Raises:
            ValueError: if `weight_by` does not fit the batch, or gives something else than one number.
        """
        if self.weight_by is None:
            return None
        if callable(self.weight_by):
            count = tf.cast(self.weight_by(*keras.utils.unpack_x_y_sample_weight(data)), tf.float64)
            if count.shape.rank != 0:
                raise ValueError(
                    "`weight_by` must give one number for a batch: what its loss is divided by. "
                    f"Received: the shape {count.shape}."
                )
            return tf.stop_gradient(count)
        if rows is None:
            raise ValueError(f'`weight_by="samples"` needs batches with rows. Received: {data!r}.')
        return tf.cast(rows, tf.float64)

    def count(self) -> tf.Tensor | None:
        """What this step's gradients are divided by on this rank, a float64 scalar; None: ranks count alike.

        Raises:
            RuntimeError: outside of `fit` and `train_on_batch`, where nobody knows the batch.
        """
        step = current_step()
        if step is None:
            if self.weight_by is not None:
                raise RuntimeError(
                    "`weight_by` needs model.fit or model.train_on_batch. In a loop of your own leave it out "
                    "and multiply the loss with hvd.loss_weight(count). Received: "
                    f"weight_by={self.described!r} in another call of the optimizer."
                )
            return None
        return step.count

    def total(self, count: tf.Tensor) -> tf.Tensor:
        """The sum of the ranks' counts; all of them call it.

        Args:
            count: this rank's, a float64 scalar.
        """
        return self.exchange.comm().allreduce([count], f"hvdext.grad.{self.exchange.name}.count")[0]

    def warn_once(self, message: str) -> None:
        """Warns on the first rank, once."""
        if message not in self._has_warned and self.exchange.comm().rank == 0:
            self._has_warned.add(message)
            warn(message)


def weighed(gradients: Sequence, variables: Sequence, factor: tf.Tensor) -> list:
    """`factor * gradient`; what is no gradient but a variable's next value stays as it is.

    Args:
        gradients: tensors, `tf.IndexedSlices` or None.
        variables: the variables they belong to.
        factor: a float64 scalar.
    """
    return [
        g if is_overwritten(v) else map_gradient(lambda t: t * tf.cast(factor, t.dtype), g)
        for g, v in zip(gradients, variables, strict=True)
    ]


class TrainStep:
    """One training step of a model, on one batch.

    Args:
        weighing: of the optimizers that the step updates with.
        is_uneven: whether ranks may have different numbers of batches, and so meet in no loss.
        is_accumulated: whether micro-batches are put together.
        is_one_mean: asked when a loss is made: whether all of the loss is this one, besides penalties of
            weights, which count the same on all ranks.
        rows: of the batch, an integer scalar; None where nobody knows.
        count: what all of the loss is divided by, a float64 scalar; None: the same on all ranks, unless a
            loss says otherwise.

    Attributes:
        rows: as given.
        count: as given, or what the one loss is divided by, once that has been made.
    """

    def __init__(
        self,
        weighing: Weighing,
        *,
        is_uneven: bool,
        is_accumulated: bool,
        is_one_mean: Callable[[], bool],
        rows: tf.Tensor | None,
        count: tf.Tensor | None,
    ):
        self.rows = rows
        self.count = count
        self._weighing = weighing
        self._comm = weighing.exchange.comm()
        self._op = weighing.exchange.options.op
        self._is_uneven = is_uneven
        self._is_one_mean = is_one_mean
        self._is_alone = self._comm.size == 1 and not is_accumulated
        self._losses = 0

    def take(self, loss: tf.Tensor, reduction: Reduction) -> tf.Tensor:
        """What is differentiated, and shown, in place of `loss`, which is a scalar."""
        if self._is_alone or self._op is ReduceOp.ADASUM or reduction.kind == "none":
            return loss
        self._losses += 1
        if callable(self._weighing.weight_by):
            return self._of_all(loss, self.count, weigh=False)
        if reduction.kind == "own":
            if self._weighing.weight_by is None and self._comm.size > 1:
                self._weighing.warn_once(_OWN)
            return loss
        if reduction.kind == "sum":
            return self._sum(loss)
        if reduction.kind == "plain":
            return loss
        count = tf.cast(reduction.count, tf.float64)
        if self._is_one_mean():
            self.count = count
            return self._of_all(loss, count, weigh=False)
        return self._of_all(loss, count, weigh=True)

    def _sum(self, loss):
        """A sum over samples: one process would have all of it."""
        if self._op is ReduceOp.SUM or self._comm.size == 1:
            return loss
        if self._is_uneven:
            self._weighing.warn_once(_UNEVEN)
            return loss
        factor = tf.constant(float(self._comm.size), loss.dtype)
        if self.count is not None:
            factor /= tf.cast(self._base(self.count, self._weighing.total(self.count)), loss.dtype)
        return loss * factor

    def _of_all(self, loss, count, weigh):
        """The loss of all ranks' samples, whose gradient is that of this rank's share.

        Args:
            loss: a mean over this rank's.
            count: over how many; float64.
            weigh: whether the share is weighed here, and not when gradients are combined.
        """
        if self._comm.size == 1:
            return loss
        if self._is_uneven:
            if weigh:
                self._weighing.warn_once(_UNEVEN)
            return loss
        base = tf.ones([], tf.float64) if self.count is None else self.count
        mine = tf.stack([tf.cast(loss, tf.float64) * count, count, base])
        name = f"hvdext.loss.{self._weighing.exchange.name}.{self._losses}"
        (all_ranks,) = self._comm.allreduce([tf.stop_gradient(mine)], name)
        total, counts, bases = tf.unstack(all_ranks)
        factor = tf.ones([], tf.float64)
        if weigh:
            share = self._comm.size * tf.math.divide_no_nan(count, counts)
            factor = tf.math.divide_no_nan(share, self._base(base, bases))
        mean = tf.math.divide_no_nan(total, counts)
        return _shown_as(loss, tf.cast(mean, loss.dtype), tf.cast(factor, loss.dtype))

    def _base(self, count, total):
        """What the gradients of the step are weighed with when they are combined."""
        return self._comm.size * tf.math.divide_no_nan(count, total)


@tf.custom_gradient
def _shown_as(loss, value, factor):
    """`value`, with the gradient of `factor * loss`."""
    del loss
    return tf.identity(value), lambda upstream: (upstream * factor, None, None)


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
