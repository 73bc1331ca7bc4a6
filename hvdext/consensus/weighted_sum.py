"""The ranks' weighted sum of tensors, the one exchange of warm-up and consensus."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvdext.comm.communicator import Communicator


def weighted_sums(
    comm: Communicator, values: Sequence[tf.Tensor], share: float, name: str
) -> list[tf.Tensor]:
    """The sum over ranks of share * value for each of `values`; every rank of `comm` must call it.

    A weighted mean, if the ranks' shares add up to 1. Of a rank whose share is 0 the values may be anything.

    Args:
        comm: the ranks.
        values: this rank's, floating and of one dtype; the same shapes on every rank.
        share: this rank's weight, at least 0.
        name: of the collective.
    """
    # Not 0 * x, which is no zero where x is not finite.
    sent = [v * tf.constant(share, v.dtype) if share > 0 else tf.zeros_like(v) for v in values]
    return comm.allreduce(sent, name)
