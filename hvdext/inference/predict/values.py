"""Predictions on their way from a model to the caller: tensors of any kind as plain arrays, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Value:
    """One output of one or more batches.

    Attributes:
        kind: "dense", "ragged" or "sparse".
        arrays: of a ragged tensor the flat values and the row splits of each level, of a sparse one indices,
            values and shape.
    """

    kind: str
    arrays: tuple[np.ndarray, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return sum(array.nbytes for array in self.arrays)


def of_tensor(tensor: Any) -> Value:
    """What a model has given for one batch."""
    if isinstance(tensor, tf.RaggedTensor):
        parts = (tensor.flat_values, *tensor.nested_row_splits)
        return Value("ragged", tuple(part.numpy() for part in parts))
    if isinstance(tensor, tf.SparseTensor):
        return Value("sparse", (tensor.indices.numpy(), tensor.values.numpy(), tensor.dense_shape.numpy()))
    return Value("dense", (np.asarray(tensor),))


def merged(values: Sequence[Value]) -> list[Value]:
    """Neighbours that fit together as one: fewer pieces to send."""
    groups: list[list[Value]] = []
    for value in values:
        if groups and _kin(groups[-1][0]) == _kin(value) is not None:
            groups[-1].append(value)
        else:
            groups.append([value])
    return [group[0] if len(group) == 1 else _stacked(group) for group in groups]


def joined(values: Sequence[Value]) -> Any:
    """What `model.predict` returns for these outputs of all its batches.

    An array; where batches differ in another axis than the first, a `tf.RaggedTensor`, as Keras does it.
    """
    first = values[0]
    if first.kind == "sparse":
        return tf.sparse.concat(0, [tf.SparseTensor(*value.arrays) for value in values])
    if first.kind == "ragged":
        return tf.concat([_ragged(*value.arrays) for value in values], 0)
    arrays = [value.arrays[0] for value in values]
    if len(arrays) == 1:
        # A piece of a message may lie at any byte, and a tensor's memory may not be written to.
        return np.require(arrays[0], requirements=["A", "W"])
    if arrays[0].ndim == 0:
        return np.stack(arrays)
    if len({array.shape[1:] for array in arrays}) == 1:
        return np.concatenate(arrays)
    open_axes = [
        i
        for i, lengths in enumerate(zip(*[a.shape for a in arrays], strict=True))
        if i and len(set(lengths)) > 1
    ]
    levels = max(open_axes)
    return tf.concat([tf.RaggedTensor.from_tensor(array, ragged_rank=levels) for array in arrays], 0)


def nothing_like(symbolic: Any) -> Value:
    """No rows of an output of which a trace has found the dtype and shape; open lengths become 0."""
    shape = [0, *(length or 0 for length in symbolic.shape[1:])]
    dtype = symbolic.dtype.as_numpy_dtype
    if isinstance(symbolic, tf.RaggedTensor):
        flat = np.zeros([0, *symbolic.flat_values.shape[1:]], dtype)
        return Value("ragged", (flat, *[np.zeros(1, np.int64)] * symbolic.ragged_rank))
    if isinstance(symbolic, tf.SparseTensor):
        return Value("sparse", (np.zeros((0, len(shape)), np.int64), np.zeros(0, dtype), np.array(shape)))
    return Value("dense", (np.zeros(shape, dtype),))


def skeleton(outputs: Any) -> Any:
    """The structure alone."""
    return keras.tree.map_structure(lambda leaf: 0, outputs)


def _kin(value):
    """What neighbours must share; None: this one stands alone."""
    if value.kind != "dense" or value.arrays[0].ndim == 0:
        return None
    return value.arrays[0].dtype, value.arrays[0].shape[1:]


def _stacked(group):
    return Value("dense", (np.concatenate([value.arrays[0] for value in group]),))


def _ragged(flat, *splits):
    return tf.RaggedTensor.from_nested_row_splits(flat, splits, validate=False)
