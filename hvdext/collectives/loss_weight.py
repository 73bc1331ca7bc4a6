"""`hvd.loss_weight`: what a rank's loss counts for in a loop of one's own."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdext.collectives.arguments import collective_name, comm_of, converted, engine_complaint
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.autograph import without_autograph


@suggests_keywords
@without_autograph
def loss_weight(count: Any, name: str | None = None, *, process_set: ProcessSet | None = None) -> tf.Tensor:
    """What to multiply a rank's mean loss by, so that the average over ranks is the mean over all samples.

        loss = tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)
        loss *= hvd.loss_weight(tf.reduce_sum(mask))

    Every rank of the process set calls it, in each training step of a loop of one's own; in `model.fit` see
    `weight_by` of `hvd.DistributedOptimizer`. It has no gradient.

    Args:
        count: what this rank's loss was divided by, a scalar not below 0: how many samples or tokens, or the
            sum of their weights.
        name: the collective's name; None: by position.
        process_set: among which ranks; None: all.

    Returns:
        A float32 scalar, number of ranks * count / sum of the ranks' counts; 0 where that sum is 0.

    Raises:
        ValueError, TypeError: if `count` is no number, or has axes.
    """
    comm = comm_of(process_set)
    label = collective_name("loss_weight", name)
    mine = tf.cast(converted(count, "count"), tf.float64)
    if mine.shape.rank != 0:
        raise ValueError(f"`count` must be one number. Received: the shape {mine.shape}.")
    with engine_complaint(comm, "count"):
        (total,) = comm.allreduce([tf.stop_gradient(mine)], label)
    return tf.stop_gradient(tf.cast(comm.size * tf.math.divide_no_nan(mine, total), tf.float32))
