"""Softmax cross-entropy and accuracy of logits that are cut along the classes, without gathering them.

With V classes, of which rank r has the logits z_r, and the target class t:

    loss = log(sum over ranks of sum(exp(z_r - m))) + m - z_t,    m = max over ranks of max(z_r)

Each rank sends three numbers per sample (m, the sum and z_t, zero where it does not have t) instead of V/n
logits (Shoeybi et al. 2019, arXiv:1909.08053, section 3). The gradient needs no exchange: it is softmax minus
one-hot, of which each rank computes its own part.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.grid import slices_of
from hvdext.comm.names import numbered
from hvdext.common.arguments import suggests_keywords
from hvdext.placement.slices.sample_check import note

_NAME = "hvdext.slices"


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedSparseCategoricalCrossentropy(keras.losses.Loss):
    """`keras.losses.SparseCategoricalCrossentropy(from_logits=True)` of logits cut along the classes.

    For what a `ColumnDense` with `gather=False` (in `hvd.slice_layers` the rule "vocabulary") gives. Every
    rank gets the same labels, of all classes, and finds the same loss.

    Args:
        grid: the `hvd.Grid` of the layer; None: as for the layer.
        **kwargs: `reduction`, `name` and `dtype`, as in Keras.
    """

    def __init__(self, *, grid=None, name="sliced_sparse_categorical_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)
        self.comm = slices_of(grid)

    def call(self, y_true, y_pred):
        """The loss of each sample, shape of the labels.

        Args:
            y_true: integers, shape (...) or (..., 1).
            y_pred: this rank's logits, shape (..., classes / slices).
        """
        return cross_entropy(self.comm, _labels(y_true, y_pred), y_pred, f"{_NAME}.{self.name}")

    def uncut(self) -> keras.losses.Loss:
        """The loss of plain Keras for the gathered logits."""
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=self.reduction)


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedSparseCategoricalAccuracy(keras.metrics.MeanMetricWrapper):
    """`keras.metrics.SparseCategoricalAccuracy` of logits cut along the classes.

    Args:
        grid: the `hvd.Grid` of the layer; None: as for the layer.
        name: as in Keras.
        dtype: as in Keras.
    """

    @suggests_keywords
    def __init__(self, *, grid=None, name="accuracy", dtype=None):
        comm = slices_of(grid)

        def hits(y_true, y_pred):
            return _hits(comm, _labels(y_true, y_pred), y_pred, f"{_NAME}.{name}")

        super().__init__(hits, name=name, dtype=dtype)

    def uncut(self) -> keras.metrics.Metric:
        """The metric of plain Keras for the gathered logits."""
        return keras.metrics.SparseCategoricalAccuracy(name=self.name)

    def get_config(self):
        """As in Keras; the grid is not part of it."""
        return {"name": self.name, "dtype": self.dtype}


def cross_entropy(comm: Communicator, labels: tf.Tensor, logits: tf.Tensor, name: str) -> tf.Tensor:
    """The loss of each sample; see the head of this file.

    Args:
        comm: the group.
        labels: int64, shape (...), the same on all ranks; a label that is no class gives NaN.
        logits: this rank's, floating, shape (..., classes / ranks).
        name: `hvdext.<purpose>.<detail>`.

    Returns:
        Shape (...), the same on all ranks; the gradient with respect to `logits` is this rank's part.
    """
    note(name, labels)

    @tf.custom_gradient
    def loss(parts):
        parts = tf.stop_gradient(parts)
        largest = tf.reduce_max(parts, -1)
        (largest,) = comm.allreduce([largest], numbered(f"{name}.max"), op="max")
        shifted = tf.exp(parts - largest[..., tf.newaxis])
        # A row of zeros where another rank has the class.
        target = tf.one_hot(labels - comm.rank * parts.shape[-1], parts.shape[-1], dtype=parts.dtype)
        total, chosen = comm.allreduce(
            [tf.reduce_sum(shifted, -1), tf.reduce_sum(target * parts, -1)], numbered(f"{name}.sum")
        )

        def gradient(upstream):
            softmax = shifted / total[..., tf.newaxis]
            return upstream[..., tf.newaxis] * (softmax - target)

        return tf.math.log(total) + largest - chosen, gradient

    exists = (labels >= 0) & (labels < comm.size * logits.shape[-1])
    return tf.where(exists, loss(logits), float("nan"))


def _hits(comm, labels, logits, name):
    """1 where the largest of all ranks' logits is that of the label, else 0; the first of equals counts."""
    best = tf.reduce_max(logits, -1)
    place = tf.argmax(logits, -1) + comm.rank * logits.shape[-1]
    everyone = comm.allgather(best[tf.newaxis], numbered(f"{name}.best"))
    places = comm.allgather(place[tf.newaxis], numbered(f"{name}.places"))
    winner = tf.argmax(everyone, 0)
    chosen = tf.reduce_sum(tf.where(tf.one_hot(winner, comm.size, True, False, axis=0), places, 0), 0)
    return tf.cast(chosen == labels, tf.float32)


def _labels(y_true, y_pred):
    labels = tf.cast(y_true, tf.int64)
    if len(labels.shape) == len(y_pred.shape) and labels.shape[-1] == 1:
        labels = tf.squeeze(labels, -1)
    return labels
