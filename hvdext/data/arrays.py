"""Sharding arrays that fit into memory."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.data.report import report_uneven
from hvdext.data.sampler import Sampler, Share
from hvdext.data.sharded_dataset import EpochCounter, ShardedDataset, passes


def shard_arrays(x: Any, y: Any, sample_weight: Any, batch_size: int | None, share: Share) -> ShardedDataset:
    """One rank's batches of arrays; see `hvdext.data.shard`."""
    arrays, total = aligned_arrays(x, y, sample_weight)
    if batch_size is None:
        raise ValueError("`batch_size` must be given for arrays. Received: batch_size=None.")
    sampler = share.sampler(total, batch_size, "samples")
    report_uneven(sampler, share)
    epochs = EpochCounter()

    def plan(epoch: int) -> np.ndarray:
        return sampler.of_rank(share.rank, share.order.positions(total, epoch))

    orders = passes(epochs, plan, (sampler.count(share.rank),))
    batches = gathered(orders.flat_map(lambda order: _cut(order, sampler)), arrays)
    batches = batches.apply(tf.data.experimental.assert_cardinality(sampler.steps))
    return ShardedDataset(
        batches.prefetch(tf.data.AUTOTUNE),
        epochs,
        num_samples=sampler.count(share.rank),
        total_samples=total,
        dropped=sampler.dropped,
        repeated=sampler.repeated,
    )


def _cut(order: tf.Tensor, sampler: Sampler) -> tf.data.Dataset:
    """Cuts one rank's order, int64 of shape (count,), into the batches of an epoch."""
    slices = tf.data.Dataset.from_tensor_slices
    if sampler.uneven != "keep":
        return slices(tf.reshape(order, (sampler.steps, sampler.batch_size)))
    full = sampler.steps - 1
    order, last = order[: full * sampler.batch_size], order[full * sampler.batch_size :]
    batches = slices(tf.reshape(order, (full, sampler.batch_size)))
    return batches.concatenate(tf.data.Dataset.from_tensors(last))


def gathered(batches: tf.data.Dataset, arrays: Any) -> tf.data.Dataset:
    """Replaces batches of indices by the samples at these indices."""
    with tf.device("CPU:0"):  # the whole data set must not go to an accelerator
        tensors = tf.nest.map_structure(tf.convert_to_tensor, arrays)
    return batches.map(lambda indices: tf.nest.map_structure(lambda t: tf.gather(t, indices), tensors))


def aligned_arrays(x: Any, y: Any, sample_weight: Any) -> tuple[Any, int]:
    """The tuple that `fit` expects of a data set, as arrays, and their common length."""
    if sample_weight is not None and y is None:
        raise ValueError("`sample_weight` must come with `y`. Received: a sample_weight, and y=None.")
    given = {"x": x, "y": y, "sample_weight": sample_weight}
    arrays = {name: _as_arrays(name, data) for name, data in given.items() if data is not None}
    lengths = {name: sorted({len(array) for array in tf.nest.flatten(data)}) for name, data in arrays.items()}
    distinct = {length for found in lengths.values() for length in found}
    if len(distinct) != 1:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have the same number of samples along their first "
            f"axes. Received: {', '.join(f'{name}: {found}' for name, found in lengths.items())}."
        )
    return tuple(arrays.values()), distinct.pop()


def _as_arrays(name: str, data: Any) -> Any:
    """NumPy arrays in the structure of `data`, with tuples where it has lists."""
    # To tf.data a list is one tensor, not a structure.
    return keras.tree.map_structure(lambda leaf: _as_array(name, leaf), keras.tree.lists_to_tuples(data))


def _as_array(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    if array.ndim == 0:
        others = ", a tf.data.Dataset or a keras.utils.PyDataset" if name == "x" else ""
        raise ValueError(
            f"`{name}` must be arrays with samples along their first axis{others}. "
            f"Received: {name} of type {type(leaf).__name__} and shape ()."
        )
    return array
