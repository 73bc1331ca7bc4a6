"""The `tf.data.Dataset` that `shard` returns: one rank's part, a new order in every pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hvdext.common.checks import require_whole
from hvdext.data.same_order import Record
from hvdext.keras_tools.data import DatasetAround


class EpochCounter:
    """Numbers the passes over a data set: every pass takes the next number."""

    def __init__(self) -> None:
        self.next = 0
        self._lock = threading.Lock()

    def take(self) -> int:
        """The number of the pass that begins now."""
        with self._lock:
            epoch = self.next
            self.next += 1
        return epoch


class ShardedDataset(DatasetAround):
    """One rank's part of a data set, made by `hvdext.data.shard`.

    A `tf.data.Dataset` like any other, for `fit` as well as for loops of your own. Each pass over
    it is one epoch: the pass takes its number when its first batch is drawn, and its order follows
    from the seed and that number. Ranks therefore agree as long as all of them begin equally many
    passes; a rank that looks at a batch on its own must `set_epoch` afterwards.

    Attributes:
        num_samples: samples that this rank takes per epoch, repeated ones included. Elements,
            if `shard` got a `tf.data.Dataset` and no batch size. None if not known beforehand.
        total_samples: samples in the whole data set, or None if not known beforehand.
        dropped: samples that no rank takes in an epoch, or None if not known beforehand.
        repeated: samples that are taken once more in an epoch, or None if not known beforehand.
        record: the first elements of the latest pass as they came, for `fit` to compare; or None.
    """

    def __init__(
        self,
        dataset: tf.data.Dataset,
        epochs: EpochCounter,
        num_samples: int | None,
        total_samples: int | None,
        dropped: int | None,
        repeated: int | None,
    ):
        self._epochs = epochs
        self.num_samples = num_samples
        self.total_samples = total_samples
        self.dropped = dropped
        self.repeated = repeated
        self.record: Record | None = None
        super().__init__(dataset)

    @property
    def epoch(self) -> int:
        """The number that the next pass will take, from 0."""
        return self._epochs.next

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the number of the next pass, e.g. to resume a training.

        Call it on every rank; a pass that has begun keeps its order.

        Args:
            epoch: passes done so far, at least 0.

        Raises:
            ValueError: if `epoch` is not an integer of at least 0.
        """
        require_whole("epoch", epoch, 0)
        self._epochs.next = epoch


def passes(epochs: EpochCounter, plan: Callable[[int], Any], shape: tuple[int, ...]) -> tf.data.Dataset:
    """A data set of one element per pass: `plan(epoch)`, int64 of `shape`, for that pass."""

    def plan_next() -> np.ndarray:
        return np.asarray(plan(epochs.take()), np.int64)

    def begin_pass(_: tf.Tensor) -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(plan_next, [], tf.int64), shape)

    return tf.data.Dataset.range(1).map(begin_pass)
