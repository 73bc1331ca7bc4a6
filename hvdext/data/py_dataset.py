"""Sharding a `keras.utils.PyDataset`: whole batches are dealt to the ranks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from hvdext.common.checks import require_whole
from hvdext.data.report import report_uneven
from hvdext.data.sampler import Share


def shard_py_dataset(source: keras.utils.PyDataset, share: Share) -> keras.utils.PyDataset:
    """One rank's batches of `source`; see `hvdext.data.shard`."""
    if source.num_batches is None:
        return _endless(source, share)
    if share.uneven == "keep":
        raise ValueError(
            "`uneven` must be 'drop' or 'repeat' for a PyDataset, whose batches are dealt whole. "
            "Received: uneven='keep'."
        )
    return ShardedPyDataset(source, share)


def _endless(source: keras.utils.PyDataset, share: Share) -> EndlessPyDataset:
    if share.mode != "scatter":
        raise ValueError(
            "`mode` must be 'scatter' for an infinite PyDataset, which has no contiguous blocks. "
            f"Received: mode={share.mode!r}."
        )
    return EndlessPyDataset(source, share)


class _Forwarding(keras.utils.PyDataset):
    """Keeps the settings of `source` and forwards the ends of epochs to it."""

    def __init__(self, source: keras.utils.PyDataset):
        super().__init__(
            workers=source.workers,
            use_multiprocessing=source.use_multiprocessing,
            max_queue_size=source.max_queue_size,
        )
        self._source = source

    def first_of_all(self) -> Any:
        """The first of all ranks' batches, which must be the same on each of them."""
        return self._source[0]

    def on_epoch_begin(self) -> None:
        """Forwards to the source."""
        self._source.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Forwards to the source."""
        self._source.on_epoch_end()


class ShardedPyDataset(_Forwarding):
    """One rank's batches of a finite `PyDataset`, made by `hvdext.data.shard`.

    Attributes:
        total_batches: batches in the source.
        dropped: batches that no rank takes in an epoch.
        repeated: batches that are taken once more in an epoch.
    """

    def __init__(self, source: keras.utils.PyDataset, share: Share):
        super().__init__(source)
        sampler = share.sampler(source.num_batches, 1, "batches")
        report_uneven(sampler, share)
        self.total_batches = sampler.total
        self.dropped = sampler.dropped
        self.repeated = sampler.repeated
        self._share = share
        self._sampler = sampler
        self._in_epoch = False
        self.set_epoch(0)

    @property
    def epoch(self) -> int:
        """Number of the epoch whose order is in force, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Takes the order of `epoch`, e.g. to resume a training. Call it on every rank.

        Args:
            epoch: epochs done so far, at least 0.

        Raises:
            ValueError: if `epoch` is not an integer of at least 0.
        """
        require_whole("epoch", epoch, 0)
        self._epoch = epoch
        order = self._share.order.positions(self._sampler.total, epoch)
        self._batches: np.ndarray = self._sampler.of_rank(self._share.rank, order)

    def __len__(self) -> int:
        return self._sampler.steps

    def __getitem__(self, index: int):
        """Batch `index` of this rank's epoch, as the source returns it."""
        return self._source[int(self._batches[index])]

    def on_epoch_begin(self) -> None:
        """Notes that an epoch runs, and forwards to the source."""
        self._in_epoch = True
        super().on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Forwards to the source, and takes the next order if an epoch has run.

        Keras calls it once before the first epoch, too. The order changes here and not in
        `on_epoch_begin` because the workers start to fetch batches before that is called.
        """
        super().on_epoch_end()
        if self._in_epoch:
            self._in_epoch = False
            self.set_epoch(self._epoch + 1)


class EndlessPyDataset(_Forwarding):
    """One rank's batches of an infinite `PyDataset`: r, r + size, r + 2 * size, ...

    Attributes:
        dropped, repeated: 0.
    """

    def __init__(self, source: keras.utils.PyDataset, share: Share):
        super().__init__(source)
        self.dropped = 0
        self.repeated = 0
        self._share = share

    @property
    def num_batches(self) -> None:
        """None: the source has no end."""
        return None

    def __getitem__(self, index: int):
        """Batch `index` of this rank, as the source returns it."""
        return self._source[index * self._share.size + self._share.rank]
