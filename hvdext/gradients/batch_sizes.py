"""Do the ranks' batches have one size? It is told along with the gradients, where ranks count alike.

An average over ranks is the mean over all samples only then. Each rank's number of rows has its own place in
the first message of a step:

    sum over ranks of one_hot(rank) * rows  =  (rows_0, ..., rows_{n-1})
"""

from __future__ import annotations

import sys

import tensorflow as tf

from hvdext.comm.communicator import Communicator

_MOST = 60_000.0  # what float16 holds
_TOLERANCE = 1e-3  # how it rounds


class BatchSizes:
    """Looks at each step's sizes, and says once on the first rank that they differ."""

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("/CPU:0"):
            self._told = tf.Variable(False, trainable=False, name="told_of_batch_sizes")

    def numbers(self, comm: Communicator, rows: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        """What travels with gradients of this type, shape (ranks,); their sum over ranks is everybody's size.

        Args:
            comm: the ranks.
            rows: of this rank's batch, an integer scalar.
            dtype: a floating type.
        """
        mine = tf.minimum(tf.cast(rows, dtype), tf.constant(_MOST, dtype))
        return tf.one_hot(comm.rank, comm.size, dtype=dtype) * mine

    def look(self, comm: Communicator, sizes: tf.Tensor) -> None:
        """Says so if the ranks' sizes differ.

        Args:
            comm: the ranks.
            sizes: of their batches, floating, shape (ranks,).
        """
        if comm.rank != 0:
            return
        largest = tf.reduce_max(sizes)
        differ = largest - tf.reduce_min(sizes) > tf.cast(_TOLERANCE, sizes.dtype) * largest

        def tell():
            tf.print(
                "hvdext: this step's batches have",
                tf.cast(tf.round(sizes), tf.int32),
                "samples on ranks",
                comm.ranks,
                "and each rank counts the same, unlike in one process: weight_by='samples' in "
                "hvd.DistributedOptimizer weighs them (told once).",
                summarize=comm.size,
                output_stream=sys.stderr,
            )
            self._told.assign(True)
            return tf.constant(True)

        tf.cond(tf.logical_and(differ, ~self._told), tell, lambda: tf.constant(False))
