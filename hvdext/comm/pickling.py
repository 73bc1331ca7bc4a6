"""Objects as bytes. What does not pickle travels as a word about it: the others wait for this rank."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import cloudpickle
import numpy as np


class _Unpicklable:
    """Travels in place of an object that does not pickle."""

    def __init__(self, reason: str):
        self.reason = reason


def pickled(value: Any) -> np.ndarray:
    """`value` as a uint8 array, with cloudpickle; where that fails, the reason why."""
    try:
        data = cloudpickle.dumps(value)
    except Exception as error:  # pickling runs the object's own code
        data = cloudpickle.dumps(_Unpicklable(f"{type(value).__name__}: {error}"))
    return np.frombuffer(data, np.uint8)


def unpickled(array: np.ndarray) -> list:
    """What `pickled` was given for each array that `array` joins, or a reason why it did not pickle."""
    stream = io.BytesIO(array.tobytes())
    values = []
    while stream.tell() < array.size:  # a pickle says itself where it ends
        values.append(pickle.load(stream))
    return values


def check_pickled(values: Mapping[int, Any]) -> None:
    """Raises if one of `values` is a reason why there is none.

    Args:
        values: what `unpickled` returned, by rank.

    Raises:
        ValueError: that names the ranks.
    """
    problems = {rank: v.reason for rank, v in values.items() if isinstance(v, _Unpicklable)}
    if problems:
        lines = [f"rank {rank}: {reason}" for rank, reason in problems.items()]
        raise ValueError("`obj` must be an object that pickles. Received:\n  " + "\n  ".join(lines))
