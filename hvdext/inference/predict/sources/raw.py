"""Rows as the user has given them, for methods of the model's own that make batches of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from hvdext.inference.predict.rounds import evenly
from hvdext.inference.predict.sources.rows import Rows, rows_of
from hvdext.inference.predict.sources.source import Source, rows_in
from hvdext.inference.predict.sources.sources import DEFAULT_BATCH_SIZE, DatasetSource, RowSource


class Given(NamedTuple):
    """Some of the rows, as the user has given them.

    Attributes:
        data: `x`, and `y` and `sample_weight` as far as there are any.
        rows: how many.
    """

    data: dict[str, Any]
    rows: int


class RawRows(Source):
    """The rows as the user has given them, for methods that make their own batches of them.

    Args:
        source: what compares them.
        label: "Class.method".
        parts: `x`, `y`, `sample_weight`, as far as there are any.
    """

    def __init__(self, source: RowSource, label: str, parts: dict[str, Any], batch_size: int):
        self._source = source
        self._label = label
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._batch_size = batch_size
        self.rows, self.batches = source.rows, source.batches
        self.names = [name for name in self._parts if name != "x"]

    def given_to(self, rank: int, size: int) -> tuple[Given | None, Callable[[], tuple[int, int]]]:
        """All that a rank evaluates, and then its rows and its last batch."""
        assert self.batches is not None
        run = evenly(0, self.batches, size)[rank]
        given = self.cut(run.start, run.stop) if len(run) else None
        return given, lambda: (0 if given is None else given.rows, run.stop - 1)

    def read(self, start: int, stop: int) -> Iterator[tuple[Given, int]]:
        """As in `Source`."""
        for number in range(start, stop):
            given = self.cut(number, number + 1)
            yield given, given.rows

    def cut(self, start: int, stop: int) -> Given:
        """The rows of batches `start` to `stop` - 1."""
        assert self.rows is not None
        begin, end = start * self._batch_size, min(stop * self._batch_size, self.rows)
        return Given({name: _cut(part, begin, end) for name, part in self._parts.items()}, end - begin)

    def example(self) -> Given | None:
        """As in `Source`."""
        return self.cut(0, 1) if self.batches else None

    def spec(self) -> Any:
        """As in `Source`."""
        return self._source.spec()

    def facts(self) -> dict[str, object]:
        """As in `Source`."""
        return self._source.facts() | {"the model's own method": self._label}


class RawDataset(Source):
    """A data set as the user has given it, a batch at a time."""

    def __init__(self, source: DatasetSource, label: str):
        self._source = source
        self._label = label
        self.batches = source.batches
        self.landmarks = source.landmarks  # a list that grows

    def given_to(self, rank: int, size: int) -> tuple[Given | None, Callable[[], tuple[int, int]]]:
        """All that a rank evaluates, and then its rows and its last batch."""
        batches = self._source.share(rank, size)
        rows, last, begun = 0, -1, next(batches, None)
        if begun is None:
            self.seen = self._source.seen
            return None, lambda: (0, -1)

        def generate():
            nonlocal rows, last
            for number, (batch, count) in itertools.chain([begun], batches):
                rows, last = rows + count, number
                yield batch

        def result():
            self.seen = self._source.seen
            return rows, last

        dataset = tf.data.Dataset.from_generator(generate, output_signature=self._source.spec())
        return Given({"x": dataset}, 0), result

    def read(self, start: int, stop: int) -> Iterator[tuple[Given, int]]:
        """As in `Source`; each batch as a data set of one batch."""
        for batch, rows in self._source.read(start, stop):
            yield Given({"x": tf.data.Dataset.from_tensors(batch)}, rows), rows

    def ends_at(self, count: int) -> bool:
        """As in `Source`."""
        return self._source.ends_at(count)

    def example(self) -> Given | None:
        """As in `Source`."""
        first = self._source.example()
        return None if first is None else Given({"x": tf.data.Dataset.from_tensors(first)}, rows_in(first))

    def spec(self) -> Any:
        """As in `Source`."""
        return self._source.spec()

    def facts(self) -> dict[str, object]:
        """As in `Source`."""
        return self._source.facts() | {"the model's own method": self._label}


def raw_source(source: Source, label: str, batch_size: int | None, **parts: Any) -> RawRows | RawDataset:
    """`source` for a method that takes the user's own data.

    Raises:
        ValueError: if it is of a kind that cannot be handed over in parts.
    """
    if source.example() is None:
        raise ValueError(f"`x` must have at least one row for {label}. Received: none.")
    if isinstance(source, RowSource):
        rows = {n: rows_of(n, p) if isinstance(p, (str, os.PathLike)) else p for n, p in parts.items()}
        return RawRows(source, label, rows, batch_size or DEFAULT_BATCH_SIZE)
    if isinstance(source, DatasetSource):
        return RawDataset(source, label)
    raise ValueError(
        f"`x` must be arrays, a folder or a tf.data.Dataset for a model with a method of its own, {label}, "
        f"of which each rank is given a part. Received: a {type(parts['x']).__name__}."
    )


def listed_texts(x: Any) -> Any:
    """A list of texts, which methods of tasks take, as an array; anything else as it is."""
    is_one = isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(one, (str, bytes)) for one in x)
    return np.array(x, dtype=object) if is_one else x


def _cut(part, start, stop):
    if isinstance(part, (list, tuple)) and part and isinstance(part[0], (str, bytes)):
        return part[start:stop]
    return keras.tree.map_structure(lambda leaf: _cut_leaf(leaf, start, stop), part)


def _cut_leaf(leaf, start, stop):
    if leaf is None:
        return None
    if isinstance(leaf, Rows):  # in files
        return np.asarray(leaf.read(start, stop))
    if isinstance(leaf, tf.SparseTensor):
        shape = leaf.shape.as_list()
        return tf.sparse.slice(leaf, [start, *[0] * (len(shape) - 1)], [stop - start, *shape[1:]])
    return leaf.iloc[start:stop] if hasattr(leaf, "iloc") else leaf[start:stop]
