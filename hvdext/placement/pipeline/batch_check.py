"""Have all ranks of a pipeline been given the same batch? A few numbers of each, compared with the results.

Ranks that differ would train on one's inputs and another's targets, without an error. The numbers travel in
the message that ranks exchange once per batch anyway.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

COUNT = 3  # numbers per rank: of x, of y, rows
_NONE = -1.0  # of x or y that a rank is not given
_BITS = (1 << 52) - 1  # of a fingerprint, which float64 holds exactly


def marks_of(x: Any, y: Any, rows: tf.Tensor) -> tf.Tensor:
    """What is compared of a batch: float64, shape (COUNT,).

    Args:
        x: a structure of tensors, or None; tensors without elements stand for None.
        y: the same.
        rows: of the batch, an integer.
    """
    return tf.stack([_fingerprint(x), _fingerprint(y), tf.cast(rows, tf.float64)])


def checks_of(marks: tf.Tensor) -> list[tf.Operation]:
    """Fails if the marks of ranks differ, on all of them alike; in eager mode at once.

    Args:
        marks: of all ranks, shape (ranks, COUNT).
    """
    rules = [
        "`x` must have the same batches in the same order",
        "`y` must have the same batches in the same order",
        "`x` and `y` must have batches of equally many rows",
    ]
    checks = []
    for rule, found in zip(rules, tf.unstack(marks, axis=1), strict=True):
        highest = tf.reduce_max(found)
        lowest = tf.reduce_min(tf.where(found == _NONE, highest, found))
        message = (
            f"{rule} on all ranks of a pipeline that are given one: shuffle with the same seed on all. "
            "Received: batches that differ; rows, or fingerprints (-1: none), by rank:"
        )
        check = tf.debugging.Assert(tf.equal(highest, lowest), [message, tf.cast(found, tf.int64)], 64)
        checks += [] if check is None else [check]
    return checks


def with_rows_of(structure: Any, outputs: Any) -> Any:
    """`structure`, each tensor cut or filled up to the rows of the output that it belongs to.

    A batch with more rows here than where its inputs came from would otherwise fail between two messages, and
    other ranks wait for this one; as it is, `checks_of` fails on all.

    Args:
        structure: targets, weights or None; left as it is unless it has one tensor for each output.
        outputs: of the model.
    """
    tensors, like = keras.tree.flatten(structure), keras.tree.flatten(outputs)
    if len(tensors) != len(like):
        return structure
    fitted = [t if t is None else _with_rows(t, tf.shape(o)[0]) for t, o in zip(tensors, like, strict=True)]
    return keras.tree.pack_sequence_as(structure, fitted)


def _with_rows(tensor, rows):
    has = tf.shape(tensor)[0]
    fit = lambda: tf.gather(tensor, tf.minimum(tf.range(rows), has - 1))  # noqa: E731
    return tf.cond(tf.equal(rows, has), lambda: tensor, fit)


def _fingerprint(structure):
    leaves = [leaf for leaf in tf.nest.flatten(structure, expand_composites=True) if leaf is not None]
    leaves = [leaf for leaf in leaves if leaf.shape.num_elements() != 0]
    if not leaves:
        return tf.constant(_NONE, tf.float64)
    parts = [tf.fingerprint(tf.reshape(leaf, [1, -1]))[0] for leaf in leaves]
    bits = tf.fingerprint(tf.concat(parts, 0)[tf.newaxis])[0]
    number = tf.cast(tf.bitwise.bitwise_and(tf.bitcast(bits, tf.int64), _BITS), tf.float64)
    return tf.where(tf.add_n([tf.size(leaf) for leaf in leaves]) > 0, number, _NONE)
