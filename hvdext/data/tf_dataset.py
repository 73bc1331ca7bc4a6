"""Sharding a `tf.data.Dataset`: every rank draws the same order and keeps its own elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvdext.common.checks import require_whole
from hvdext.data.report import report_uncounted, report_uneven
from hvdext.data.same_order import Record, undecided_order
from hvdext.data.sampler import Sampler, Share
from hvdext.data.sharded_dataset import EpochCounter, ShardedDataset, passes
from hvdext.keras_tools.dataset_order import order_of

DEFAULT_SHUFFLE_BUFFER = 10_000  # elements


def shard_dataset(
    dataset: tf.data.Dataset, batch_size: int | None, shuffle_buffer: int | None, share: Share
) -> ShardedDataset:
    """One rank's elements or batches of `dataset`; see `hvdext.data.shard`."""
    if batch_size is not None:
        require_whole("batch_size", batch_size, 1)
    if shuffle_buffer is not None:
        require_whole("shuffle_buffer", shuffle_buffer, 1)
    record = _record_of(dataset) if share.size > 1 else None
    if record is not None:
        dataset = record.around(dataset)
    dealt = _dealt_by_length(dataset, batch_size, shuffle_buffer, share)
    dealt.record = record
    return dealt


def _record_of(dataset: tf.data.Dataset) -> Record | None:
    """What notes the order as it is drawn, where that does not follow from what all ranks can compare."""
    order = order_of(dataset)
    if order.undecided:
        raise undecided_order(order.undecided)
    return Record() if order.is_hidden or order.is_redrawn else None


def _dealt_by_length(
    dataset: tf.data.Dataset, batch_size: int | None, shuffle_buffer: int | None, share: Share
) -> ShardedDataset:
    total = int(dataset.cardinality())
    shuffled = _Shuffle(dataset, share, shuffle_buffer or DEFAULT_SHUFFLE_BUFFER)
    if total == tf.data.INFINITE_CARDINALITY:
        return _shard_endless(shuffled, batch_size, share)
    if total == tf.data.UNKNOWN_CARDINALITY:
        return _shard_uncounted(shuffled, batch_size, share)
    return _shard_counted(shuffled, total, batch_size, share)


class _Shuffle:
    """The data set in the order that all ranks draw in one pass, given the seed of that pass."""

    def __init__(self, dataset: tf.data.Dataset, share: Share, buffer: int):
        self.dataset = dataset
        self._active = share.order.seed is not None
        self._buffer = buffer

    def __call__(self, seed: tf.Tensor) -> tf.data.Dataset:
        if not self._active:
            return self.dataset
        # TensorFlow mixes its global seed into every shuffle, and scripts like to set that to
        # another value on each rank. This runs inside the trace of `flat_map`, where set_seed
        # changes the seed of the traced graph only. It must not be 0: see `random_seed.get_seed`.
        tf.random.set_seed(1)
        return self.dataset.shuffle(self._buffer, seed=seed, reshuffle_each_iteration=False)


def _shard_counted(shuffled: _Shuffle, total: int, batch_size: int | None, share: Share) -> ShardedDataset:
    if share.uneven == "keep" and batch_size is None:
        raise ValueError(
            "`batch_size` must be given with uneven='keep', which makes a smaller last batch. "
            "Received: batch_size=None."
        )
    sampler = share.sampler(total, batch_size or 1, "elements")
    report_uneven(sampler, share)

    def one_pass(seed: tf.Tensor) -> tf.data.Dataset:
        dealt = _dealt(shuffled(seed), sampler, share.rank)
        if sampler.uneven != "keep":
            return _batched(dealt, batch_size)
        sizes = [sampler.batch_size] * (sampler.steps - 1) + [sampler.last_batch_size(share.rank)]
        return dealt.batch(sampler.batch_size).rebatch(sizes)

    return _assembled(
        shuffled.dataset,
        one_pass,
        share,
        cardinality=sampler.steps,
        num_samples=sampler.count(share.rank),
        total_samples=total,
        dropped=sampler.dropped,
        repeated=sampler.repeated,
    )


def _dealt(dataset: tf.data.Dataset, sampler: Sampler, rank: int) -> tf.data.Dataset:
    """The elements of `rank` out of one pass over all of them."""
    used = dataset.repeat() if sampler.repeated else dataset
    if sampler.mode == "scatter":
        return used.take(sampler.used).shard(sampler.size, rank)
    return used.skip(sampler.start(rank)).take(sampler.count(rank))


def _shard_endless(shuffled: _Shuffle, batch_size: int | None, share: Share) -> ShardedDataset:
    _require_scatter(share, "infinite")
    return _assembled(
        shuffled.dataset,
        lambda seed: _batched(shuffled(seed).shard(share.size, share.rank), batch_size),
        share,
        cardinality=tf.data.INFINITE_CARDINALITY,
        dropped=0,
        repeated=0,
    )


def _shard_uncounted(shuffled: _Shuffle, batch_size: int | None, share: Share) -> ShardedDataset:
    _require_scatter(share, "unknown")
    if share.uneven != "drop":
        raise ValueError(
            "`uneven` must be 'drop' for a tf.data.Dataset of unknown cardinality "
            "(tf.data.experimental.assert_cardinality makes it known). "
            f"Received: uneven={share.uneven!r}."
        )
    group = share.size * (batch_size or 1)
    report_uncounted(group, share)
    return _assembled(
        shuffled.dataset,
        lambda seed: _batched(_of_full_groups(shuffled(seed), group, share), batch_size),
        share,
        cardinality=tf.data.UNKNOWN_CARDINALITY,
        repeated=0,
    )


def _of_full_groups(dataset: tf.data.Dataset, group: int, share: Share) -> tf.data.Dataset:
    """This rank's elements of every full group of `group` elements, a multiple of `size`.

    Unlike `Dataset.shard` it gives every rank equally many, without knowing how many there are.
    """

    def pick(*window: Any) -> tf.data.Dataset:
        elements = tf.data.Dataset.zip(window[0] if len(window) == 1 else window)
        return elements.shard(share.size, share.rank)

    return dataset.window(group, drop_remainder=True).flat_map(pick)


def _require_scatter(share: Share, cardinality: str) -> None:
    if share.mode != "scatter":
        raise ValueError(
            f"`mode` must be 'scatter' for a tf.data.Dataset of {cardinality} cardinality, which "
            f"has no contiguous blocks. Received: mode={share.mode!r}."
        )


def _batched(dataset: tf.data.Dataset, batch_size: int | None) -> tf.data.Dataset:
    return dataset if batch_size is None else dataset.batch(batch_size, drop_remainder=True)


def _assembled(
    source: tf.data.Dataset,
    one_pass: Callable[[tf.Tensor], tf.data.Dataset],
    share: Share,
    cardinality: int,
    num_samples: int | None = None,
    total_samples: int | None = None,
    dropped: int | None = None,
    repeated: int | None = None,
) -> ShardedDataset:
    epochs = EpochCounter()
    seeds = passes(epochs, share.order.shuffle_seed, ())
    dataset = seeds.flat_map(one_pass)
    if cardinality != tf.data.UNKNOWN_CARDINALITY:
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(cardinality))
    # The source is hidden in a function now, where TensorFlow does not look for options.
    options = tf.data.Options().merge(source.options())
    options.deterministic = True  # another order on another rank would deal samples twice
    return ShardedDataset(
        dataset.with_options(options).prefetch(tf.data.AUTOTUNE),
        epochs,
        num_samples=num_samples,
        total_samples=total_samples,
        dropped=dropped,
        repeated=repeated,
    )
