"""How much a layer computes, and what it keeps for backward beside its outputs: estimates from shapes.

Per sample, forward; a multiplication and an addition are two operations. Where there is no rule for a class,
each element of its weight matrices works once per position, and what has no matrices takes one operation per
element; `balance="measured"` knows better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

Shapes = Sequence[tuple[int, ...]]

_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
_STEPWISE = (keras.layers.RNN, keras.layers.Bidirectional)


def flops_of(operation: Any, inputs: Shapes, outputs: Shapes) -> int:
    """Floating-point operations of one call on one sample.

    Args:
        operation: a Keras layer or operation.
        inputs: shapes of what it takes, without the batch.
        outputs: shapes of what it returns, without the batch.
    """
    if isinstance(operation, _ATTENTION):
        return _attention_flops(_sizes_of(operation, inputs), inputs, outputs)
    matrices = [weight for weight in getattr(operation, "weights", []) if len(weight.shape) > 1]
    if not matrices or type(operation) is keras.layers.Embedding:
        return max(sum(map(math.prod, inputs)), sum(map(math.prod, outputs)))
    elements = sum(math.prod(matrix.shape) for matrix in matrices)
    return 2 * elements * _positions(operation, inputs, outputs)


def kept_inside(operation: Any, inputs: Shapes) -> int:
    """Bytes per sample that backward needs from the inside of a call: known of attention, else 0.

    Args:
        operation: a Keras layer or operation.
        inputs: shapes of what it takes, without the batch.
    """
    if not isinstance(operation, _ATTENTION):
        return 0
    n = _sizes_of(operation, inputs)
    projected = n.heads * n.queries * (n.key + n.value) + n.stored * n.keys * (n.key + n.value)
    scores = 2 * n.heads * n.queries * n.keys  # before and after the softmax
    return (projected + scores) * tf.as_dtype(operation.compute_dtype).size


def _positions(operation, inputs: Shapes, outputs: Shapes) -> int:
    """How often each element of the weight matrices works."""
    if isinstance(operation, _STEPWISE):
        return inputs[0][0]
    if isinstance(operation, keras.layers.EinsumDense):
        taken, returned = operation.equation.replace("...", "").split("->")
        kernel = dict(zip(taken.split(",")[1], operation.kernel.shape, strict=True))
        of_kernel = math.prod(kernel[letter] for letter in set(returned) & set(kernel))
        return math.prod(outputs[0]) // of_kernel
    transposed = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
    shape = inputs[0] if isinstance(operation, transposed) else outputs[0]
    if getattr(operation, "data_format", None) == "channels_first":
        return math.prod(shape[1:])
    return math.prod(shape[:-1])


class _Attention(NamedTuple):
    queries: int  # positions
    keys: int  # positions
    heads: int
    stored: int  # heads of keys and values
    key: int  # width of a head's key
    value: int  # width of a head's value


def _sizes_of(attention, inputs: Shapes) -> _Attention:
    queries, keys = math.prod(inputs[0][:-1]), math.prod(inputs[min(1, len(inputs) - 1)][:-1])
    if isinstance(attention, keras.layers.GroupQueryAttention):
        width = attention.head_dim
        return _Attention(
            queries, keys, attention.num_query_heads, attention.num_key_value_heads, width, width
        )
    heads = attention.num_heads
    return _Attention(queries, keys, heads, heads, attention.key_dim, attention.value_dim)


def _attention_flops(n: _Attention, inputs: Shapes, outputs: Shapes) -> int:
    value = inputs[min(1, len(inputs) - 1)]
    key = inputs[2] if len(inputs) > 2 and len(inputs[2]) == len(value) else value
    projections = (
        n.queries * inputs[0][-1] * n.heads * n.key
        + n.keys * n.stored * (key[-1] * n.key + value[-1] * n.value)
        + n.queries * n.heads * n.value * outputs[0][-1]
    )
    scores = n.heads * n.queries * n.keys * (n.key + n.value)
    return 2 * (projections + scores)
