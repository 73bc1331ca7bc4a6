"""What each rank does by itself, while the others wait to hear of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdext.comm import Communicator


def everywhere(comm: Communicator, action: Callable[[], Any], name: str, failed: str) -> list:
    """Returns what `action()` returned on each rank, in rank order.

    Args:
        comm: whose ranks; each of them must call it.
        action: this rank's own; may fail, which is heard by all. Its result must pickle.
        name: the collective's name, the same on every rank.
        failed: the error's first line.

    Raises:
        RuntimeError: on every rank alike, if `action()` raises on any; it names these ranks and their errors.
            On such a rank it comes from the rank's own error.
    """
    value, failure = None, None
    try:
        value = action()
    except Exception as error:  # whatever a user's function, data or model raises: the others are waiting
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone = comm.allgather_object((value, text), name)
    lines = [f"  rank {r}: {t}" for r, (_, t) in zip(comm.ranks, everyone, strict=True) if t is not None]
    if lines:
        raise RuntimeError("\n".join([failed, *lines])) from failure
    return [value for value, _ in everyone]
