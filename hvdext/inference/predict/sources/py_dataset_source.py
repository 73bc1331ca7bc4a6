"""A `keras.utils.PyDataset` as batches for predictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.inference.predict.sources.read_ahead import read_ahead
from hvdext.inference.predict.sources.rows import as_tensor, batch_spec
from hvdext.inference.predict.sources.source import Source, fingerprint, rows_in


class PyDatasetSource(Source):
    """A `keras.utils.PyDataset`: each rank asks for its own batches, in `workers` threads.

    Its epoch begins with the first call of `read`. As in Keras, a batch is read before, to see what it is.
    """

    def __init__(self, dataset: keras.utils.PyDataset):
        if dataset.num_batches is None:
            raise ValueError("`x` must come to an end. Received: a PyDataset whose `num_batches` is None.")
        self._dataset = dataset
        self.batches = int(dataset.num_batches)
        self._first = self._load(0) if self.batches else None
        self._has_begun = False

    def read(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """As in `Source`."""
        if not self._has_begun:
            self._has_begun = True
            self._dataset.on_epoch_begin()
        workers = max(1, self._dataset.workers)
        ahead = max(workers, self._dataset.max_queue_size) if workers > 1 else 1
        return read_ahead(self._batch, range(start, stop), workers, ahead)

    def end(self) -> None:
        """As in `Source`."""
        if self._has_begun:
            self._dataset.on_epoch_end()

    def example(self) -> Any:
        """As in `Source`."""
        return self._first

    def spec(self) -> Any:
        """As in `Source`."""
        if self._first is None:
            return None
        return keras.tree.map_structure(lambda leaf: leaf if leaf is None else batch_spec(leaf), self._first)

    def facts(self) -> dict[str, object]:
        """As in `Source`."""
        first = "there is none" if self._first is None else fingerprint(self._first)
        return {
            "batches": self.batches,
            "type of a batch": str(self.spec()),
            "SHA-256 of the first batch": first,
        }

    def _batch(self, number):
        batch = self._load(number)
        return batch, rows_in(batch)

    def _load(self, number):
        batch = self._dataset[number]
        if isinstance(batch, list):
            batch = tuple(batch)
        if not isinstance(batch, (tuple, dict)):
            batch = (batch,)
        # Keras' adapter takes types as they are.
        return keras.tree.map_structure(_as_it_is, keras.tree.lists_to_tuples(batch))


def _as_it_is(leaf):
    if leaf is None or tf.is_tensor(leaf):
        return leaf
    array = np.asarray(leaf)
    return as_tensor(array) if array.dtype == object else tf.convert_to_tensor(array)
