"""Gradients of several local micro-batches, kept until it is time to exchange and apply them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdext.keras_tools.selection import path_of


class Accumulator:
    """Adds up gradients over `passes` micro-batches.

    Dense gradients are added. Sparse ones are kept as slices, one batch behind the other: Keras'
    optimizers are not linear in sparse gradients, so only the slices of all micro-batches together equal
    one large batch.

    Its variables belong to no model and no optimizer, so that nothing of it is saved: training that is
    resumed from a checkpoint starts at the beginning of a cycle.

    Args:
        passes: micro-batches per cycle, at least 2.
        average: divide the sum by `passes`.
    """

    def __init__(self, passes: int, average: bool):
        self.passes = passes
        self.average = average
        self._stores: list[_Dense | _Sparse | None] | None = None
        self._kinds: dict[str, str] = {}
        with tf.init_scope(), tf.device("/CPU:0"):
            self._count = tf.Variable(0, dtype=tf.int64, trainable=False, name="micro_batches")
            self._weight = tf.Variable(0, dtype=tf.float64, trainable=False, name="weight")

    def add(
        self,
        gradients: Sequence[Any],
        variables: Sequence,
        maxima: Sequence[bool],
        weight: tf.Tensor | None = None,
    ):
        """Takes the gradients of one micro-batch.

        Args:
            gradients: tensors, `tf.IndexedSlices` or None, one per variable; always of the same kinds.
            variables: the variables they belong to, always in the same order.
            maxima: for which of them the largest value counts instead of the sum.
            weight: what the micro-batch counts for, a float64 scalar.

        Returns:
            A scalar bool tensor: True if the cycle is full and `take()` is due.

        Raises:
            ValueError: if variables or kinds of gradients are not those of the first micro-batch.
        """
        kinds = {path_of(v): kind_of(g) for g, v in zip(gradients, variables, strict=True)}
        if self._stores is None:
            self._kinds = kinds
            with tf.init_scope():
                self._stores = [
                    _store(*arguments) for arguments in zip(gradients, variables, maxima, strict=True)
                ]
        if kinds != self._kinds:
            raise ValueError(
                "`backward_passes_per_step` above 1 needs the same variables, with the same kinds of "
                f"gradients, in every micro-batch. Received: {kinds} after {self._kinds}."
            )
        for store, gradient in zip(self._stores, gradients, strict=True):
            if store is not None:
                store.add(gradient)
        if weight is not None:
            self._weight.assign_add(weight)
        return tf.equal(self._count.assign_add(1), self.passes)

    def weight(self) -> tf.Tensor:
        """What the micro-batches since the last `take` count for together."""
        return self._weight.read_value()

    def take(self) -> list:
        """Returns what a full cycle has added up, as `add` got it, and starts the next cycle."""
        assert self._stores is not None, "add() comes before take()"
        self._count.assign(0)
        self._weight.assign(0)
        divisor = self.passes if self.average else 1
        return [None if store is None else store.take(divisor) for store in self._stores]

    def drop(self) -> int:
        """Drops what has been added up, and starts the next cycle; returns of how many micro-batches."""
        left = int(self._count.numpy())
        if self._stores is not None:
            self.take()
        return left


def kind_of(gradient) -> str:
    """What `gradient` is: "no", "sparse" or "dense"."""
    if gradient is None:
        return "no"
    return "sparse" if isinstance(gradient, tf.IndexedSlices) else "dense"


def _store(gradient, variable, maximum):
    if gradient is None:
        return None
    shape = tf.TensorShape(variable.shape)
    if isinstance(gradient, tf.IndexedSlices):
        return _Sparse(shape, gradient.values.dtype, gradient.indices.dtype)
    return _Dense(shape, gradient.dtype, maximum)


class _Dense:
    def __init__(self, shape, dtype, maximum):
        self._sum = tf.Variable(tf.zeros(shape, dtype), trainable=False, name="accumulated")
        self._maximum = maximum

    def add(self, gradient):
        if self._maximum:
            self._sum.assign(tf.maximum(self._sum, gradient))
        else:
            self._sum.assign_add(gradient)

    def take(self, divisor):
        total = self._sum.read_value()
        self._sum.assign(tf.zeros_like(total))
        return total if divisor == 1 or self._maximum else total / divisor


class _Sparse:
    def __init__(self, shape, dtype, index_dtype):
        self._dense_shape = shape
        rows = tf.TensorShape([None]).concatenate(shape[1:])
        nothing = tf.zeros([0, *shape[1:]], dtype)
        self._values = tf.Variable(nothing, shape=rows, trainable=False, name="accumulated_values")
        self._indices = tf.Variable(
            tf.zeros([0], index_dtype), shape=[None], trainable=False, name="accumulated_indices"
        )

    def add(self, gradient):
        self._values.assign(tf.concat([self._values, gradient.values], 0))
        self._indices.assign(tf.concat([self._indices, gradient.indices], 0))

    def take(self, divisor):
        values, indices = self._values.read_value(), self._indices.read_value()
        self._values.assign(values[:0])
        self._indices.assign(indices[:0])
        # Keras reads the shape's dtype, so it must be a tensor, as backward makes it.
        dense_shape = tf.constant(self._dense_shape.as_list(), indices.dtype)
        return tf.IndexedSlices(values / divisor, indices, dense_shape)
