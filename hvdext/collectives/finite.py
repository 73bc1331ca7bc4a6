"""Whose values are not finite: the same look and the same words wherever a rank's weights must not spread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tensorflow as tf

from hvdext.common.wording import named_ranks

_MOST = 20  # paths named of one rank; more are counted


def is_finite(value) -> bool:
    """True if no number of a variable, tensor or array is infinite or NaN; integers never are."""
    # Asked of TensorFlow: NumPy knows of bfloat16 only what another package tells it.
    tensor = tf.convert_to_tensor(value)
    return not tensor.dtype.is_floating or bool(tf.reduce_all(tf.math.is_finite(tensor)))


def failing_ranks(ranks: Iterable[int], everyone: Iterable[Sequence[str]]) -> list[str]:
    """One text "rank 1: dense/kernel, dense/bias" for each rank with values that are not finite.

    Args:
        ranks: the global ranks.
        everyone: for each of them the paths of its values that are not finite.
    """
    found = []
    for rank, paths in zip(ranks, everyone, strict=True):
        if paths:
            more = f" and {len(paths) - _MOST} more" if len(paths) > _MOST else ""
            found.append(f"{named_ranks([rank])}: {', '.join(paths[:_MOST])}{more}")
    return found
