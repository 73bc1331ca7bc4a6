"""Do the ranks deal from the same samples in the same order? Otherwise some are lost and others taken twice.

Of arrays, and of what a `tf.data.Dataset` is made of, ranks compare a few rows when they shard it. What only
shows when it is drawn (a Python generator, a shuffle that is drawn anew in each pass, a PyDataset) `fit`
compares at its epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.common.wording import named_ranks
from hvdext.keras_tools.dataset_order import order_of

_ROWS = 32  # looked at, of each array
_NUMBERS = 16  # of each row
_SHOWN = 4
ORDER = (
    "`x` must hold the same samples in the same order on every rank, of which each takes its share; else "
    "some samples are taken twice and others never. Leave the shuffling to hvd.data.shard(..., seed=0), or "
    "use one seed on all ranks: dataset.shuffle(n, seed=0), np.random.default_rng(0). Sort lists of files, "
    "and draw what is random in a sample (augmentation) after the sharding"
)

Rows = list[tuple[str, np.ndarray]]


def undecided_order(problems: Sequence[str]) -> ValueError:
    """The error for data that every rank would draw in an order of its own.

    Args:
        problems: what decides it, as sentences.
    """
    return ValueError(f"{ORDER}. Received: a tf.data.Dataset with {'; '.join(problems)}.")


def description_of(x: Any, y: Any, sample_weight: Any) -> tuple[dict[str, Any], Rows]:
    """What the ranks' data must have in common: facts that are equal, and a few rows."""
    if isinstance(x, tf.data.Dataset):
        order = order_of(x)
        return {"x": (int(x.cardinality()), str(x.element_spec))}, rows_of(order.values)
    if isinstance(x, keras.utils.PyDataset):
        return {"x": (type(x).__name__, x.num_batches)}, []
    named = {"x": x, "y": y, "sample_weight": sample_weight}
    arrays = [
        (name, np.asarray(leaf))
        for name, data in named.items()
        if data is not None
        for leaf in keras.tree.flatten(data)
    ]
    return {"arrays": [(name, array.shape, array.dtype.name) for name, array in arrays]}, rows_of(arrays)


def rows_of(named: Sequence[tuple[str, Any]]) -> Rows:
    """A few rows of each array, and a few numbers or words of each row, spread over it."""
    return [(name, _sampled(np.asarray(array))) for name, array in named]


def _sampled(array):
    if array.dtype.kind not in "biufcSUO":  # such as bfloat16
        array = array.astype(np.float32)
    if array.ndim == 0:
        array = array[np.newaxis]
    rows = array[_spread(len(array), _ROWS)].reshape(min(len(array), _ROWS), -1)
    return rows[:, _spread(rows.shape[1], _NUMBERS)]


def _spread(length, count):
    return np.unique(np.linspace(0, max(length - 1, 0), min(count, length)).astype(int))


def require_same_rows(comm: Communicator, mine: Rows) -> None:
    """Compares what the ranks hold; every rank of `comm` must call it.

    Raises:
        ValueError: on every rank alike, if they hold something else.
    """
    everyone = comm.allgather_object(mine, "hvdext.data.rows")
    problem = difference(everyone, comm.ranks, ORDER)
    if problem is not None:
        raise ValueError(problem)


def difference(everyone: Sequence[Rows], ranks: Sequence[int], rule: str | None = None) -> str | None:
    """What to say if the ranks' rows differ by more than rounding; None if they do not.

    Args:
        everyone: each rank's rows, in the order of `ranks`.
        ranks: the global ranks.
        rule: what they break if any of them differs. None: they were drawn, and all parts (x, y, ...) differ
            that are not the same in all rows, since one may be augmented by random numbers.
    """
    first, is_drawn = everyone[0], rule is None
    rule = rule or ORDER
    if is_drawn and not all(everyone):  # some have drawn nothing yet
        return None
    if any([name for name, _ in rows] != [name for name, _ in first] for rows in everyone):
        names = "; ".join(
            f"{named_ranks([r])}: {[name for name, _ in rows]}"
            for r, rows in zip(ranks, everyone, strict=True)
        )
        return f"{ORDER}. Received: {names}."
    apart = []
    for part, (name, own) in enumerate(first):
        parts = [rows[part][1] for rows in everyone]
        if all(_alike(own, other) for other in parts):
            if is_drawn and not all(map(_is_constant, parts)):
                return None
        elif not is_drawn or not all(map(_is_constant, parts)):
            apart.append((name, parts))
    if not apart:
        return None
    name, parts = apart[0]
    shown = "; ".join(
        f"{named_ranks([rank])}: {rows[:_SHOWN, 0].tolist()}" for rank, rows in zip(ranks, parts, strict=True)
    )
    return f"{rule}. Received: {name}, of which there are {shown}."


def _is_constant(rows):
    return bool((rows == rows[:1]).all())


def _alike(mine, theirs):
    count = min(len(mine), len(theirs))
    mine, theirs = mine[:count], theirs[:count]
    if mine.shape != theirs.shape or mine.dtype.kind != theirs.dtype.kind:
        return False
    if mine.dtype.kind in "fc":  # worked out by processors of different kinds
        return np.allclose(mine, theirs, rtol=1e-3, atol=1e-6, equal_nan=True)
    return np.array_equal(mine, theirs)


class Record:
    """The first elements of the latest pass over a data set, as they were drawn before they were dealt."""

    def __init__(self) -> None:
        self._elements: list[list[np.ndarray]] = []

    def around(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """The same data set, of which the first elements of each pass are kept."""

        def note(number, element):
            leaves = [leaf for leaf in tf.nest.flatten(element) if isinstance(leaf, tf.Tensor)]
            noted = tf.cond(
                number < _ROWS,
                lambda: tf.numpy_function(self._note, [number, *leaves], tf.bool),
                lambda: tf.constant(True),
            )
            with tf.control_dependencies([noted]):
                return tf.nest.map_structure(tf.identity, element)

        return dataset.enumerate().map(note)

    def _note(self, number, *leaves):
        if number == 0:
            self._elements = []
        self._elements.append([_sampled(leaf)[:1] for leaf in leaves])
        return True

    def rows(self) -> Rows:
        """What has been drawn, by its place in an element."""
        parts = list(zip(*list(self._elements), strict=True))
        return [(f"part {i} of x", np.concatenate(part)) for i, part in enumerate(parts)]


def rows_of_batch(batch: Any) -> Rows:
    """A few rows of a batch of data, by their place in it."""
    leaves = [leaf for leaf in tf.nest.flatten(batch) if leaf is not None]
    return rows_of([(f"part {i} of the first batch", leaf) for i, leaf in enumerate(leaves)])
