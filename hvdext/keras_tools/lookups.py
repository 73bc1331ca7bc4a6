"""Which slices of a sparse gradient hold sums: those of a sparse lookup or matmul, one for each row.

A plain lookup (`Embedding` on dense ids) leaves a slice for every id, also where ids repeat. A sparse one
(`Dense` or `Embedding` on sparse inputs, `tf.nn.embedding_lookup_sparse`) looks up each different id once:
its gradient has one slice per row, the sum over the batch. Keras' optimizers are not linear in slices of one
row, so both must be told apart. A graph says where indices come from; eagerly the lookup itself is noted.
"""

from __future__ import annotations

import weakref
from typing import Any

import tensorflow as tf
from tensorflow.python.ops import embedding_ops

_PASSES_ON = {"Identity", "StopGradient", "Reshape", "Cast", "EnsureShape"}
_UNIQUE = {"Unique": 0, "UniqueV2": 0}  # which result of an operation holds each index once
_UNIQUE |= {f"SparseSegment{kind}GradV2": 1 for kind in ("Sum", "Mean", "SqrtN")}
_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}

_noted: dict[int, weakref.ref] = {}  # indices of sums, seen eagerly, by their id


def note_sparse_lookups() -> None:
    """From now on sparse lookups are noted eagerly, too; the second time, nothing changes."""
    plain = embedding_ops.embedding_lookup_sparse_impl
    if getattr(plain, "is_noted", False):
        return

    def lookup(params, *args, **kwargs):
        if tf.executing_eagerly():
            params = [_noting(table) for table in params]
        return plain(params, *args, **kwargs)

    lookup.is_noted = True  # type: ignore[attr-defined]
    embedding_ops.embedding_lookup_sparse_impl = lookup


@tf.custom_gradient
def _noting(table):
    def backward(gradient):
        if isinstance(gradient, tf.IndexedSlices) and hasattr(gradient.indices, "numpy"):
            indices = gradient.indices
            key = id(indices)
            _noted[key] = weakref.ref(indices, lambda _: _noted.pop(key, None))
        return gradient

    return tf.identity(table), backward


def parts_of(indices: tf.Tensor) -> list[tuple[tf.Tensor, bool]]:
    """What the indices of a sparse gradient are put together of, in this order.

    Args:
        indices: of a `tf.IndexedSlices`, shape (slices,).

    Returns:
        Tensors with as many numbers in them, each with whether its slices are sums, one for each row.
    """
    if hasattr(indices, "numpy"):
        noted = _noted.get(id(indices))
        return [(indices, noted is not None and noted() is indices)]
    return _traced(indices)


def _traced(tensor) -> list[tuple[Any, bool]]:
    if hasattr(tensor, "numpy"):
        return [(tensor, False)]
    op = tensor.op
    if op.type == "ConcatV2":
        return [part for value in op.inputs[:-1] for part in _traced(value)]
    return [(tensor, _is_unique(tensor, []))]


def _is_unique(tensor, calls) -> bool:
    """Whether `tensor` holds each index once, however often it was looked up.

    Args:
        tensor: symbolic.
        calls: the calls of functions in which it stands, innermost last.
    """
    while not hasattr(tensor, "numpy"):
        op = tensor.op
        if op.type in _UNIQUE:
            return tensor.value_index == _UNIQUE[op.type]
        if op.type in _PASSES_ON:
            tensor = op.inputs[0]
        elif op.type in _CALLS:
            inside = op.graph._get_function(op.get_attr("f").name)
            if inside is None:
                return False
            calls = [*calls, op]
            tensor = inside.graph.outputs[tensor.value_index]
        elif op.type == "Placeholder":
            outside = _argument(tensor, calls[-1] if calls else None)
            if outside is None:
                return False
            tensor, calls = outside, calls[:-1]
        else:
            return False
    return False


def _argument(placeholder, call):
    """What stands for `placeholder` outside of its function."""
    graph = placeholder.graph
    if call is not None:
        places = [id(tensor) for tensor in graph.inputs]
        return call.inputs[places.index(id(placeholder))] if id(placeholder) in places else None
    captures = getattr(graph, "captures", ())
    return next((outer for outer, inner in captures if inner is placeholder), None)
