"""`shard`: one rank's part of a data set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import is_number, require_whole
from hvdext.data.arrays import shard_arrays
from hvdext.data.py_dataset import EndlessPyDataset, ShardedPyDataset, shard_py_dataset
from hvdext.data.same_order import Rows, description_of, require_same_rows
from hvdext.data.sampler import Order, Share
from hvdext.data.sharded_dataset import ShardedDataset
from hvdext.data.tf_dataset import shard_dataset


@suggests_keywords
def shard(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    mode: str = "scatter",
    shuffle: bool = True,
    seed: int = 0,
    uneven: str = "drop",
    shuffle_buffer: int | None = None,
    rank: int | None = None,
    size: int | None = None,
) -> ShardedDataset | ShardedPyDataset | EndlessPyDataset:
    """This rank's part of a data set, in equally many steps per epoch on every rank.

    Every rank calls it with the same data and the same arguments, which they compare once (by a few
    rows of the arrays, unless `rank` and `size` are given). No sample travels: all ranks derive the
    same order of all samples from `seed` and the number of the epoch, and each takes its own share,
    so every sample goes to exactly one rank per epoch.

    ```python
    data = hvd.data.shard(x_train, y_train, batch_size=32)
    model.fit(data, epochs=10, shuffle=False)  # shuffle=False: `data` shuffles by itself
    ```

    What `x` may be, and what comes back:

    - Arrays (NumPy arrays, tensors, or nested tuples, lists and dicts of them, all with samples
      along the first axis): a `ShardedDataset`, i.e. a `tf.data.Dataset` of batches `(x,)`,
      `(x, y)` or `(x, y, sample_weight)` with the dtypes given.
    - A `tf.data.Dataset`: a `ShardedDataset`. With a `batch_size` its elements are taken as
      samples, dealt and batched. Without, they are dealt and not batched: batch the result
      yourself, or pass a dataset of batches, which are then dealt whole.
    - A `keras.utils.PyDataset`: a `PyDataset` of this rank's batches, which are dealt whole. The
      settings for workers are kept, the ends of epochs forwarded.

    With mode="scatter" the k-th batches of N ranks with batch size B are together the k-th batch
    of one process (`rank=0, size=1`) with batch size N*B and the same seed; with uneven="keep" in
    all but the last step. With mode="slice" only whole epochs consist of the same samples.

    Limits, by kind of data:

    - `tf.data.Dataset`: it must yield the same elements in the same order on every rank, so a
      shuffle inside it needs a seed, and the same `tf.random.set_seed` everywhere. Without a seed,
      or with others on other ranks, it is refused. What comes out of a Python generator, or is
      shuffled anew in each pass, `fit` compares from its second epoch on. Every rank reads all
      elements and keeps its share: map what is expensive, or random, afterwards, over the result.
      The order is random within `shuffle_buffer` only. If the cardinality is unknown, only
      mode="scatter" with uneven="drop" is possible, and `dropped` is None. If it is infinite, only
      mode="scatter" is, `uneven` has no effect, and `fit` needs `steps_per_epoch`.
    - `PyDataset`: what it does in `on_epoch_end` must be the same on every rank; `fit` compares
      the first batch of each epoch, whose parts must not all differ. `fit` must get
      `shuffle=False`, or it shuffles the steps once more, differently on each rank, and no
      `steps_per_epoch` other than `len()`. An infinite one is dealt in its own order.

    Args:
        x: the data; see above.
        y: targets, like `x` with as many samples; for arrays only.
        sample_weight: one weight per sample, with `y`; for arrays only.
        batch_size: samples per batch of this rank, at least 1. Required for arrays, optional for
            a `tf.data.Dataset`, not allowed for a `PyDataset`.
        mode: how an epoch's order is dealt. "scatter": rank r takes positions r, r + size, ...
            "slice": rank r takes one contiguous block.
        shuffle: whether every epoch has a new order, or all have that of the data.
        seed: non-negative integer, the same on every rank.
        uneven: what happens where `size * batch_size` does not divide the number of samples
            (with B = 1 where elements or batches are dealt unbatched):
            "drop": the remainder is left out; with `shuffle`, another one each epoch.
            "repeat": the epoch's first samples fill the last step.
            "keep": each sample is taken exactly once. The last batch takes what is left: at most
            `batch_size` samples, or `batch_size + 1` if fewer than `size` samples remain. Ranks'
            last batches differ by at most one sample; `batch_weights` weighs them.
        shuffle_buffer: elements of the shuffle buffer for a `tf.data.Dataset`, at least 1; for
            nothing else. Default 10,000.
        rank: this process, in [0, size). Default: that of `hvd.init()`.
        size: number of ranks, given together with `rank`. Default: that of `hvd.init()`.

    Returns:
        A `ShardedDataset`, `ShardedPyDataset` or `EndlessPyDataset`. The first two have
        `set_epoch(epoch)`; all tell what an epoch leaves out or takes twice as `dropped` and
        `repeated`. Rank 0 logs it as a warning of the logger "hvdext.data".

    Raises:
        ValueError: if an argument breaks its rule, or the data cannot give every rank a batch.
            Apart from `rank` it depends on what all ranks know, so all of them raise the same. On
            every rank alike: if their data, or its order, or their arguments differ.
        RuntimeError: if `rank` and `size` are left out before `hvd.init()`.
    """
    ranks_meet = rank is None and size is None
    rank, size = _rank_and_size(rank, size)

    def deal() -> Any:
        _require_no_batch_size(y=y, sample_weight=sample_weight)
        require_whole("seed", seed, 0)
        share = Share(rank, size, mode, uneven, Order(seed if shuffle else None))
        if isinstance(x, tf.data.Dataset):
            _require_none("a tf.data.Dataset", y=y, sample_weight=sample_weight)
            return shard_dataset(x, batch_size, shuffle_buffer, share)
        if isinstance(x, keras.utils.PyDataset):
            _require_none("a PyDataset", y=y, sample_weight=sample_weight)
            _require_none("a PyDataset", batch_size=batch_size, shuffle_buffer=shuffle_buffer)
            return shard_py_dataset(x, share)
        _require_none("arrays", shuffle_buffer=shuffle_buffer)
        return shard_arrays(x, y, sample_weight, batch_size, share)

    if not ranks_meet or size == 1:
        return deal()
    settings = {"mode": mode, "shuffle": shuffle, "seed": seed, "uneven": uneven, "batch_size": batch_size}
    return _agreed(deal, settings | {"shuffle_buffer": shuffle_buffer}, x, y, sample_weight)


def _agreed(deal: Callable[[], Any], settings: dict[str, Any], *data: Any) -> Any:
    """What this rank is dealt, once all ranks know that it is of the same data."""
    share: Any = None
    facts: dict[str, Any] = {}
    rows: Rows = []
    problem = None
    try:
        share = deal()
        facts, rows = description_of(*data)
    except ValueError as error:  # told to the other ranks first, who would wait for this one
        problem = str(error)
    agreement.check(current(), "hvd.data.shard", settings | facts, problem)
    require_same_rows(current(), rows)
    return share


def _rank_and_size(rank: int | None, size: int | None) -> tuple[int, int]:
    if rank is None and size is None:
        comm = current()
        return comm.rank, comm.size
    if rank is None or size is None:
        raise ValueError(
            f"`rank` and `size` must be given together, or neither. Received: rank={rank!r}, size={size!r}."
        )
    return rank, size


def _require_no_batch_size(**arguments: Any) -> None:
    """In `fit` the third argument is the batch size."""
    for name, value in arguments.items():
        if is_number(value):
            raise ValueError(
                f"`{name}` must be arrays or None; `batch_size` is given by its name: "
                f"shard(..., batch_size={value!r}). Received: {name}={value!r}."
            )


def _require_none(kind: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            shown = repr(value) if isinstance(value, int) else f"a {type(value).__name__}"
            raise ValueError(f"`{name}` must be None where `x` is {kind}. Received: {name}={shown}.")
