"""What can be predicted: batches by number, the same on every rank, of which each reads its own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.common.checks import require_whole
from hvdext.inference.predict.sources.py_dataset_source import PyDatasetSource
from hvdext.inference.predict.sources.read_ahead import read_ahead
from hvdext.inference.predict.sources.rows import NpyFolderRows, Rows, rows_of
from hvdext.inference.predict.sources.source import Source, fingerprint, rows_in
from hvdext.inference.predict.sources.tfrecords import Records

DEFAULT_BATCH_SIZE = 32  # as in Keras
_SAMPLES = 16  # rows by which arrays are told apart
_END = object()


class RowSource(Source):
    """Arrays and folders of `.npy` files."""

    def __init__(self, x: Any, y: Any, sample_weight: Any, batch_size: int):
        parts = [rows_of("x", x)]
        if y is not None:
            parts.append(rows_of("y", y))
        if sample_weight is not None:
            weights = rows_of("sample_weight", sample_weight)
            if isinstance(weights, Rows) and keras.tree.is_nested(parts[1]):
                weights = keras.tree.map_structure(lambda _: weights, parts[1])  # one for all outputs
            parts.append(weights)
        self._parts = parts
        self._batch_size = batch_size
        leaves = [leaf for leaf in keras.tree.flatten(parts) if leaf is not None]
        counts = sorted({leaf.count for leaf in leaves})
        if len(counts) != 1:
            names = [
                name
                for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight))
                if part is not None
            ]
            raise ValueError(
                f"The arrays of {_listed(names)} must have equally many rows. Received: {counts}."
            )
        self.rows = counts[0]
        self.batches = math.ceil(self.rows / batch_size)
        self._is_on_disk = any(isinstance(leaf, NpyFolderRows) for leaf in leaves)

    def read(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """As in `Source`."""
        numbers = range(start, stop)
        return read_ahead(self._batch, numbers) if self._is_on_disk else map(self._batch, numbers)

    def example(self) -> Any:
        """As in `Source`."""
        return self._batch(0)[0] if self.batches else None

    def spec(self) -> Any:
        """As in `Source`."""
        return self._mapped(lambda leaf: leaf.spec)

    def facts(self) -> dict[str, object]:
        """As in `Source`."""
        assert self.rows is not None
        sampled = np.unique(np.linspace(0, max(self.rows - 1, 0), _SAMPLES).astype(int))[: self.rows]
        tensors = [self._mapped(lambda leaf, i=int(i): leaf.read(i, i + 1)) for i in sampled]
        return {
            "batch_size": self._batch_size,
            "rows": self.rows,
            "type of a batch": str(self.spec()),
            f"SHA-256 of {len(sampled)} rows": fingerprint(tensors),
        }

    def _batch(self, number):
        begin = number * self._batch_size
        end = min(begin + self._batch_size, self.rows)
        return self._mapped(lambda leaf: leaf.read(begin, end)), end - begin

    def _mapped(self, function):
        """The data of a step, packed as Keras does: `x` alone, unless it looks like `(x, y)`."""
        parts = [
            keras.tree.map_structure(lambda leaf: leaf if leaf is None else function(leaf), p)
            for p in self._parts
        ]
        return parts[0] if len(parts) == 1 and not isinstance(parts[0], tuple) else tuple(parts)


class DatasetSource(Source):
    """A `tf.data.Dataset` of batches: every rank goes through all of it and keeps its own.

    Args:
        dataset: of batches, the same on every rank.
        spec: the type of a batch after `convert`; None: that of the data set's elements.
        convert: what makes a batch of an element; only done for batches of this rank.
    """

    def __init__(
        self, dataset: tf.data.Dataset, spec: Any = None, convert: Callable[[Any], Any] | None = None
    ):
        count = int(dataset.cardinality())
        if count == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "`x` must come to an end: use x.take(batches). Received: an infinite tf.data.Dataset."
            )
        self.batches = None if count == tf.data.UNKNOWN_CARDINALITY else count
        self._spec = dataset.element_spec if spec is None else spec
        if any(leaf.shape.rank == 0 for leaf in tf.nest.flatten(self._spec)):
            raise ValueError(
                "`x` must be a tf.data.Dataset of batches: use x.batch(batch_size). "
                f"Received: one whose elements hold scalars, {self._spec}."
            )
        self._convert = convert or (lambda element: element)
        self._elements = iter(dataset)
        self._position = 0
        self._first = next(self._elements, _END)
        self.landmarks: list[str] = []

    def read(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """As in `Source`."""
        while self._position < stop and (element := self._next()) is not _END:
            if self._position > start:
                yield self._batch(element)

    def share(self, rank: int, size: int) -> Iterator[tuple[int, tuple[Any, int]]]:
        """As in `Source`."""
        while (element := self._next()) is not _END:
            number = self._position - 1
            if number % size == rank:
                yield number, self._batch(element)
        self.seen = self._position

    def ends_at(self, count: int) -> bool:
        """As in `Source`."""
        while self._position < count:
            if self._next() is _END:
                return False
        return self._position == count and self._next() is _END  # a rank may have skipped more than there are

    def example(self) -> Any:
        """As in `Source`."""
        return None if self._first is _END else self._convert(self._first)

    def spec(self) -> Any:
        """As in `Source`."""
        return self._spec

    def facts(self) -> dict[str, object]:
        """As in `Source`."""
        first = "there is none" if self._first is _END else fingerprint(self._first)
        return {
            "batches": self.batches,
            "type of a batch": str(self._spec),
            "SHA-256 of the first batch": first,
        }

    def _next(self):
        element = self._first if self._position == 0 else next(self._elements, _END)
        if element is not _END:
            self._position += 1
            if self._position & (self._position - 1) == 0:
                self.landmarks.append(fingerprint(element))
        return element

    def _batch(self, element):
        batch = self._convert(element)
        return batch, rows_in(batch)


def make_source(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    batch_size: int | None = None,
    parse: Callable[[tf.Tensor], Any] | None = None,
) -> Source:
    """The batches of `x`; see `hvdext.predict` for what that may be.

    Raises:
        ValueError: if an argument breaks its rule.
    """
    if batch_size is not None:
        require_whole("batch_size", batch_size, 1)
    is_folder = isinstance(x, (str, os.PathLike))
    if parse is not None and not (is_folder and callable(parse)):
        raise ValueError(
            "`parse` must be a function, and goes with a folder of TFRecord files. "
            f"Received: parse={parse!r} with x of type {type(x).__name__}."
        )
    if sample_weight is not None and y is None:
        raise ValueError("`sample_weight` must come with `y`. Received: a sample_weight, and y=None.")
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)) or parse is not None:
        kind = "a folder of TFRecord files" if parse is not None else _kind(x)
        for name, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise ValueError(
                    f"`{name}` must be None where `x` is {kind}, which holds it. "
                    f"Received: a {type(value).__name__}."
                )
    if parse is not None:
        records = Records(Path(x), parse, batch_size or DEFAULT_BATCH_SIZE)
        return DatasetSource(records.raw, records.spec, records.parsed)
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)):
        if batch_size is not None:
            raise ValueError(
                f"`batch_size` must be None where `x` is {_kind(x)}, which has batches of its own. "
                f"Received: batch_size={batch_size!r}."
            )
        return DatasetSource(x) if isinstance(x, tf.data.Dataset) else PyDatasetSource(x)
    if is_folder:
        _refuse_records(Path(x))
    return RowSource(x, y, sample_weight, batch_size or DEFAULT_BATCH_SIZE)


def _refuse_records(folder):
    if folder.is_dir() and not any(folder.rglob("*.npy")) and any(folder.glob("*.tfrecord*")):
        raise ValueError(
            "`parse` must be given for a folder of TFRecord files. "
            f"Received: parse=None with {str(folder)!r}."
        )


def _kind(x):
    return "a tf.data.Dataset" if isinstance(x, tf.data.Dataset) else "a PyDataset"


def _listed(names):
    return ", ".join(f"`{name}`" for name in names)
