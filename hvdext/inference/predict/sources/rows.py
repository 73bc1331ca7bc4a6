"""Arrays of any kind as rows of which a few at a time become tensors, as Keras would make them."""

from __future__ import annotations

import abc
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Rows(abc.ABC):
    """Rows of one input, target or weight.

    Attributes:
        count: how many.
        spec: the type of a batch, its first axis open.
    """

    count: int
    spec: tf.TypeSpec

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> Any:
        """Rows `start` to `stop` - 1 as a tensor."""


class ArrayRows(Rows):
    """A NumPy array, in memory or mapped, or what turns into one. Floats become `keras.config.floatx()`."""

    def __init__(self, name: str, array: Any):
        self._array = np.asarray(array)
        if self._array.ndim == 0:
            raise ValueError(f"`{name}` must have rows along a first axis. Received: an array of shape ().")
        self.count = len(self._array)
        sample = self.read(0, min(1, self.count))
        self.spec = tf.TensorSpec((None, *self._array.shape[1:]), sample.dtype)

    def read(self, start: int, stop: int) -> tf.Tensor:
        """As in `Rows`."""
        return as_tensor(self._array[start:stop])


class TensorRows(Rows):
    """A tensor: dense, ragged or sparse."""

    def __init__(self, name: str, tensor: Any):
        if tensor.shape.rank == 0:
            raise ValueError(f"`{name}` must have rows along a first axis. Received: a tensor of shape ().")
        self._tensor = tensor
        self.count = row_count(tensor)
        self.spec = batch_spec(self.read(0, min(1, self.count)))

    def read(self, start: int, stop: int) -> Any:
        """As in `Rows`."""
        if isinstance(self._tensor, tf.SparseTensor):
            shape = self._tensor.shape.as_list()
            begin = [start, *[0] * (len(shape) - 1)]
            return _in_floatx(tf.sparse.slice(self._tensor, begin, [stop - start, *shape[1:]]))
        return _in_floatx(self._tensor[start:stop])


class NpyFolderRows(Rows):
    """The rows of all `.npy` files of a folder, by file name; read where they are, as far as needed."""

    def __init__(self, name: str, folder: Path):
        self._files = sorted(path for path in folder.iterdir() if path.suffix == ".npy")
        if not self._files:
            raise ValueError(
                f"`{name}` must be a folder that holds .npy files. Received: {str(folder)!r}, without any."
            )
        heads = [_mapped(name, path) for path in self._files]
        first = heads[0]
        for path, head in zip(self._files, heads, strict=True):
            if (head.dtype, head.shape[1:]) != (first.dtype, first.shape[1:]):
                raise ValueError(
                    f"`{name}` must be a folder of .npy files with one type and shape per row. "
                    f"Received: {self._files[0].name} of {_row(first)} and {path.name} of {_row(head)}."
                )
        self._name = name
        self._ends = np.cumsum([len(head) for head in heads])
        self._open: tuple[int, np.ndarray] = (0, first)
        self.count = int(self._ends[-1])
        self.spec = tf.TensorSpec((None, *first.shape[1:]), as_tensor(first[:0]).dtype)

    def read(self, start: int, stop: int) -> tf.Tensor:
        """As in `Rows`; a batch may lie in several files."""
        pieces = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            before = int(self._ends[number - 1]) if number else 0
            end = min(stop, int(self._ends[number]))
            pieces.append(self._file(number)[start - before : end - before])
            start, number = end, number + 1
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self._file(0)[:0]])
        return as_tensor(whole)

    def _file(self, number):
        if self._open[0] != number:
            self._open = (number, _mapped(self._name, self._files[number]))
        return self._open[1]


def rows_of(name: str, data: Any) -> Any:
    """The structure of `data` with `Rows` for its arrays.

    A folder of `.npy` files is one array, a folder of such folders a dict of arrays.

    Raises:
        ValueError: if something in it is no array or no such folder.
    """
    if isinstance(data, (str, os.PathLike)):
        return _folder(name, Path(data))
    return keras.tree.map_structure(lambda leaf: _leaf(name, leaf), keras.tree.lists_to_tuples(data))


def as_tensor(array: np.ndarray) -> tf.Tensor:
    """A tensor of `array`, its floats in Keras' own float type."""
    if array.dtype == object and all(isinstance(one, str) for one in array.flat):
        return tf.convert_to_tensor(array, tf.string)
    return _in_floatx(tf.convert_to_tensor(array))


def row_count(tensor: Any) -> int:
    """The length of the first axis."""
    if isinstance(tensor, tf.RaggedTensor):
        return int(tensor.nrows())
    if isinstance(tensor, tf.SparseTensor):
        return int(tensor.dense_shape[0])
    return int(tensor.shape[0])


def batch_spec(tensor: Any) -> tf.TypeSpec:
    """The type of a batch like `tensor`, its first axis open."""
    shape = tf.TensorShape([None, *tensor.shape[1:]])
    if isinstance(tensor, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, tensor.dtype, tensor.ragged_rank, tensor.row_splits.dtype)
    if isinstance(tensor, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, tensor.dtype)
    return tf.TensorSpec(shape, tensor.dtype)


def _leaf(name, leaf):
    if leaf is None:
        return None
    if isinstance(leaf, (tf.Tensor, tf.Variable, tf.RaggedTensor, tf.SparseTensor)):
        return TensorRows(name, leaf)
    if type(leaf).__module__.partition(".")[0] == "pandas":
        array = leaf.to_numpy()
        return ArrayRows(name, array[:, np.newaxis] if array.ndim == 1 else array)  # as Keras does
    if isinstance(leaf, np.ndarray) or hasattr(leaf, "__array__"):
        return ArrayRows(name, leaf)
    raise ValueError(
        f"`{name}` must be arrays with rows along their first axis, nested tuples, lists or dicts of them, a "
        f"folder, a tf.data.Dataset or a keras.utils.PyDataset. Received: a {type(leaf).__name__}."
    )


def _folder(name, folder):
    if not folder.is_dir():
        raise ValueError(f"`{name}` must be a folder that exists. Received: {str(folder)!r}.")
    parts = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if parts and not any(path.suffix == ".npy" for path in folder.iterdir()):
        return {part.name: NpyFolderRows(name, part) for part in parts}
    return NpyFolderRows(name, folder)


def _mapped(name, path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{name}` must hold .npy files that can be read. Received: {path}: {error}"
        ) from error
    if array.ndim == 0:
        raise ValueError(f"`{name}` must hold .npy files with rows. Received: {path}, an array of shape ().")
    return array


def _row(array):
    return f"{array.dtype.name} {array.shape[1:]}"


def _in_floatx(tensor):
    floatx = keras.config.floatx()
    return tf.cast(tensor, floatx) if tensor.dtype.is_floating and tensor.dtype != floatx else tensor
