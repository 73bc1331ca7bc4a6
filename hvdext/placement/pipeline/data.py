"""What a pipeline's ranks are given as data: is it complete, do micro-batches fit, do ranks agree?"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.keras_tools.training import BATCH_SIZE, is_arrays


def complete(x: Any, y: Any, *, needs_x: bool, needs_y: bool, rank: int) -> tuple[Any, Any]:
    """`x` and `y` as Keras needs them on a rank that was given what its stages need.

    Args:
        x: arrays, a data set, or None where the first stage is elsewhere and `y` says how many rows there
            are.
        y: targets, or None.
        needs_x: whether the first stage is here.
        needs_y: whether the last stage is here.
        rank: of the pipeline, for the message.

    Raises:
        ValueError: if what is needed is missing.
    """
    if x is None and (needs_x or y is None):
        raise ValueError(
            "`x` must be given on the rank of the first stage, and x or y on every other. "
            f"Received: x=None{', y=None' if y is None else ''} on rank {rank} of the pipeline."
        )
    if needs_y and y is None and is_arrays(x):
        raise ValueError(
            "`y` must be given on the rank of the last stage. "
            f"Received: y=None on rank {rank} of the pipeline."
        )
    if x is None:
        x = NoValues(first_rows(y))
    return x, y


class NoValues(np.ndarray):
    """Stands in for inputs that a rank does not need: so many rows without anything in them.

    Args:
        rows: how many.
    """

    def __new__(cls, rows: int):
        """An array of shape (rows, 0)."""
        return np.zeros((rows, 0), "float32").view(cls)


def first_rows(x: Any) -> int:
    """How many rows arrays have."""
    return keras.tree.flatten(x)[0].shape[0]


def rows_of(x: Any) -> tf.Tensor:
    """How many rows a batch has, once it is there: its shape alone may be known before, and without data."""
    leaf = keras.tree.flatten(x)[0]
    with tf.control_dependencies(tf.nest.flatten(leaf, expand_composites=True)):
        return tf.identity(tf.shape(leaf)[0])


def microbatch_problem(microbatches: int, rows: int, batch_size: int) -> str | None:
    """What is wrong with micro-batches of batches of `batch_size` rows out of `rows`; None if nothing."""
    sizes = {min(rows, batch_size), rows % batch_size} - {0}
    wrong = sorted(size for size in sizes if size % microbatches)
    if not wrong:
        return None
    return (
        "`microbatches` must divide the number of rows of each batch, of the last one too. Received: "
        f"microbatches={microbatches} and {rows} rows in batches of {batch_size}, of which some have "
        f"{' or '.join(map(str, wrong))}."
    )


def require_whole_microbatches(
    microbatches: int, x: Any, validation_split: float, batch_size: int | None
) -> None:
    """Refuses arrays that Keras would cut into batches which are no whole micro-batches.

    Args:
        microbatches: of each batch.
        x: arrays; nothing is known of other data.
        validation_split: the part of the rows that is not trained on.
        batch_size: of `fit`.

    Raises:
        ValueError: if `microbatches` does not divide a batch's rows.
    """
    if is_arrays(x):
        rows = math.floor(first_rows(x) * (1 - validation_split))
        problem = microbatch_problem(microbatches, rows, batch_size or BATCH_SIZE)
        if problem is not None:
            raise ValueError(problem)


def checked_rows(microbatches: int, rows: tf.Tensor, static_rows: int | None) -> tf.Tensor:
    """`rows`, once it is known that the micro-batches are equally large.

    Args:
        microbatches: of the batch.
        rows: of the batch.
        static_rows: what is known of them before the batch is there.

    Raises:
        ValueError: if it is known before that they are not.
    """
    problem = microbatch_problem(microbatches, static_rows, static_rows) if static_rows else None
    if problem is not None:
        raise ValueError(problem)
    message = (
        "`microbatches` must divide the number of rows of each batch. "
        f"Received: microbatches={microbatches} and a batch of so many rows:"
    )
    check = tf.debugging.Assert(tf.equal(rows % microbatches, 0), [message, rows])
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(rows)


def parts_of(structure: Any, microbatches: int) -> list:
    """A structure for each micro-batch, all with equally many rows.

    Args:
        structure: of tensors, or None.
        microbatches: how many.
    """
    if structure is None:
        return [None] * microbatches
    flat = [tf.split(tensor, microbatches) for tensor in keras.tree.flatten(structure)]
    return [keras.tree.pack_sequence_as(structure, [parts[k] for parts in flat]) for k in range(microbatches)]


def digest(structure: Any) -> str | None:
    """A few characters that differ for different values; None for no values."""
    leaves = [leaf for leaf in keras.tree.flatten(structure) if leaf is not None]
    if any(isinstance(leaf, tf.TypeSpec) for leaf in leaves):
        return None
    leaves = [np.asarray(leaf) for leaf in tf.nest.flatten(leaves, expand_composites=True)]
    if not any(leaf.size for leaf in leaves):
        return None
    total = hashlib.sha256()
    for leaf in leaves:
        strings = leaf.dtype == object  # an array of addresses
        total.update(f"{leaf.shape} {leaf.dtype}".encode())
        total.update(repr(leaf.tolist()).encode() if strings else np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()[:8]
