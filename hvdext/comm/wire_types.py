"""The types in which tensors travel: what the engine sums and moves, and what others become for it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

# What the engine reduces as it is. Others travel in the nearest type that holds them.
_REDUCIBLE = {tf.uint8, tf.int8, tf.int32, tf.int64, tf.float16, tf.float32, tf.float64}
_WIDER = {
    tf.bfloat16: tf.float32,
    tf.bool: tf.int32,
    tf.int16: tf.int32,
    tf.uint16: tf.int32,
    tf.uint32: tf.int64,
}
_MOVABLE = _REDUCIBLE | {tf.int16, tf.uint16, tf.bool}
# The engine's reducescatter knows two types less.
_SCATTERS_WIDER = _WIDER | {tf.uint8: tf.int32, tf.int8: tf.int32}


def can_be_reduced(dtype: tf.DType) -> bool:
    """True for the types that `Communicator.allreduce` takes: real numbers and booleans."""
    return dtype in _REDUCIBLE or dtype in _WIDER


def summed_in(dtype: tf.DType) -> tf.DType:
    """The type in which the engine's allreduce combines values of type `dtype`.

    Raises:
        TypeError: if they cannot be summed.
    """
    return _wider(dtype, _WIDER)


def scattered_in(dtype: tf.DType) -> tf.DType:
    """The type in which the engine's reducescatter sums values of type `dtype`.

    Raises:
        TypeError: if they cannot be summed.
    """
    return _wider(dtype, _SCATTERS_WIDER)


def is_exact(tensor: tf.Tensor, *factors: float) -> bool:
    """True if the engine, which holds its factors in float32, scales `tensor` by `factors` without loss."""
    return tensor.dtype != tf.float64 or all(float(np.float32(factor)) == factor for factor in factors)


def scaled(tensor: tf.Tensor, factor: float) -> tf.Tensor:
    """`factor * tensor`, in the type of `tensor`."""
    # Not tf.cast: it would round a Python number to float32 first.
    return tensor if factor == 1.0 else tensor * tf.constant(factor, tensor.dtype)


def bytes_of(tensor: tf.Tensor) -> tf.Tensor:
    """How many bytes `tensor` holds, as an int64 scalar."""
    return tf.size(tensor, out_type=tf.int64) * tensor.dtype.size


def movable(tensor: tf.Tensor) -> tf.Tensor:
    """`tensor` in a type the engine moves; others as their bytes, along a new last axis."""
    return tensor if tensor.dtype in _MOVABLE else tf.bitcast(tensor, tf.uint8)


def moved(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """What `movable` was given, of type `dtype`, after the journey."""
    return tensor if tensor.dtype == dtype else tf.bitcast(tensor, dtype)


def _wider(dtype, wider):
    if not can_be_reduced(dtype):
        raise TypeError(f"`tensors` must hold real numbers that can be summed. Received: {dtype.name}.")
    return wider.get(dtype, dtype)
