"""Arithmetic on gradients: dense tensors, `tf.IndexedSlices` and None alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def as_tensors(gradient):
    """A gradient of tensors; `tf.IndexedSlices` may have been made of arrays, lists or tuples."""
    if isinstance(gradient, tf.IndexedSlices):
        parts = gradient.values, gradient.indices, gradient.dense_shape
        return tf.IndexedSlices(*(None if part is None else tf.convert_to_tensor(part) for part in parts))
    return None if gradient is None else tf.convert_to_tensor(gradient)


def values_of(gradient) -> tf.Tensor:
    """A gradient's numbers: the tensor, or the slices' values."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def map_gradient(function: Callable[[tf.Tensor], tf.Tensor], gradient):
    """Applies `function` to a gradient's numbers: the tensor, the slices' values, or nothing."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(function(gradient.values), gradient.indices, gradient.dense_shape)
    return function(gradient)


def times(gradients: Sequence, factor: float | tf.Tensor) -> list:
    """`factor * gradient` for each gradient, in its own type."""
    if isinstance(factor, (int, float)) and factor == 1:
        return list(gradients)
    # tf.cast would round a Python number to float32 first.
    exact = tf.cast if tf.is_tensor(factor) else tf.constant
    return [map_gradient(lambda g: g * exact(factor, g.dtype), g) for g in gradients]


def squared_norm(gradient) -> tf.Tensor:
    """The sum of a gradient's squared numbers in float32; as in Keras, slices of one row count separately."""
    return tf.reduce_sum(tf.square(tf.cast(values_of(gradient), tf.float32)))


def clipped(gradient, squares: tf.Tensor, limit: float):
    """`gradient`, scaled so that a norm is at most `limit`: Keras' own clipping then finds nothing to do.

        g <- g * limit / max(norm, limit)

    Args:
        gradient: a gradient, or None.
        squares: the norm's square, float32: that of the whole, of which `gradient` may be a part.
        limit: as `clipnorm` and `global_clipnorm` of Keras' optimizers.
    """
    norm = tf.sqrt(squares)
    factor = limit / tf.maximum(norm, limit) + (norm - norm)  # an infinite norm makes NaN, as in Keras
    return map_gradient(lambda g: g * tf.cast(factor, g.dtype), gradient)


def all_finite(gradients: Sequence) -> tf.Tensor:
    """True, as a scalar, if no number of any gradient is infinite or NaN."""
    present = [gradient for gradient in gradients if gradient is not None]
    finite = [tf.reduce_all(tf.math.is_finite(values_of(gradient))) for gradient in present]
    return tf.reduce_all([True, *finite])


def poisoned(gradients: Sequence, unless: tf.Tensor) -> list:
    """`gradients`, the first of them NaN unless `unless`: whoever skips overflows then skips this step."""
    poison = tf.where(unless, 0.0, float("nan"))
    first = next(i for i, gradient in enumerate(gradients) if gradient is not None)
    changed: Any = map_gradient(lambda g: g + tf.cast(poison, g.dtype), gradients[first])
    return [*gradients[:first], changed, *gradients[first + 1 :]]


def is_overwritten(variable) -> bool:
    """True for variables whose "gradient" is their next value (Keras' float8 scales)."""
    return bool(getattr(variable, "overwrite_with_gradient", False))
