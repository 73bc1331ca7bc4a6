"""Sparse gradients whose slices are sums: where the ranks' slices of one row meet, they are added up.

One process with the whole batch would have one slice per row of a sparse matmul, and one per id of a plain
lookup. So the first are added up, over ranks and over micro-batches, and the others are put side by side.
On their way, indices say themselves which are which:

    index + n * rows    of the n-th sparse lookup, n = 1, 2, ...
    index               of a plain lookup
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvdext.keras_tools.lookups import parts_of


def marked(gradients: Sequence, variables: Sequence) -> list:
    """`gradients` in which the indices of slices that are sums are marked.

    Args:
        gradients: tensors, `tf.IndexedSlices` or None, one per variable.
        variables: the variables they belong to.
    """
    return [
        _marked(gradient, variable.shape[0]) if isinstance(gradient, tf.IndexedSlices) else gradient
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def _marked(slices, rows):
    parts = parts_of(slices.indices)
    if not any(are_sums for _, are_sums in parts):
        return slices
    shifts, lookups = [], 0
    for part, are_sums in parts:
        lookups += are_sums
        shifts.append(tf.fill([tf.size(part)], tf.constant(lookups * rows if are_sums else 0, tf.int64)))
    indices = tf.cast(slices.indices, tf.int64) + tf.concat(shifts, 0)
    return tf.IndexedSlices(slices.values, indices, slices.dense_shape)


def added_up(gradient, variable):
    """`gradient` without marks: of slices that are sums, those of one row are added up.

    Args:
        gradient: what `marked` has made, perhaps of several ranks or micro-batches; or anything else.
        variable: the variable it belongs to.
    """
    if not isinstance(gradient, tf.IndexedSlices) or gradient.indices.dtype != tf.int64:
        return gradient
    rows = variable.shape[0]

    def summed():
        indices = gradient.indices
        alone = -1 - tf.range(tf.size(indices, tf.int64))  # the slices of plain lookups meet nobody
        keys, places = tf.unique(tf.where(indices < rows, alone, indices))
        found = tf.where(keys < 0, tf.gather(indices, tf.maximum(-1 - keys, 0)), keys % rows)
        return tf.math.unsorted_segment_sum(gradient.values, places, tf.size(keys)), found

    is_marked = tf.reduce_any(gradient.indices >= rows)
    values, indices = tf.cond(is_marked, summed, lambda: (gradient.values, gradient.indices))
    return tf.IndexedSlices(values, indices, gradient.dense_shape)
