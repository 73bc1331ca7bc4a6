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

from collections.abc import Sequence

import tensorflow as tf

from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.current import current_or_none
from hvdext.comm.once import warn_once
from hvdext.gradients.exchange import GradientExchange
from hvdext.gradients.tensors import is_overwritten, map_gradient
from hvdext.gradients.train_step import SAMPLES, WeightBy, current_step
from hvdext.keras_tools.loss_reduction import Reduction


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

    @property
    def described(self) -> str | None:
        """What ranks compare: functions look different on each."""
        return "a function" if callable(self.weight_by) else self.weight_by

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

    def rows(self) -> tf.Tensor | None:
        """How many rows this step's batch has, which all ranks' should have; None: they need not."""
        step = current_step()
        return None if step is None else step.rows_of_all

    def total(self, count: tf.Tensor) -> tf.Tensor:
        """The sum of the ranks' counts; all of them call it.

        Args:
            count: this rank's, a float64 scalar.
        """
        return self.exchange.comm().allreduce([count], f"hvdext.grad.{self.exchange.name}.count")[0]


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


_OUTSIDE = (
    "A loss divides by what a mask leaves, or by weights, in a training loop of your own: ranks average "
    "these means as if all had divided by the same. Multiply the loss with hvd.loss_weight(count), count "
    "being what it was divided by."
)


def warn_of_masks(reduction: Reduction) -> None:
    """Warns once per job, on the first rank, of a loss that no training step of a model is told of."""
    comm = current_or_none()
    if reduction.kind not in ("masked", "weighted") or comm is None or comm.size == 1:
        return
    warn_once(comm, _OUTSIDE)
