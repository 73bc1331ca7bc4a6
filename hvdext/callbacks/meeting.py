"""Where callbacks of all ranks meet: one collective, so that ranks at different points notice it.

If each hook exchanged under a name of its own, a rank that validates and one that does not would wait for
each other for ever.
"""

from __future__ import annotations

from typing import Any

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import Told, raise_for


def gather(comm: Communicator, point: str, value: Any) -> list[tuple[str, Any]]:
    """Returns (point, value) of every rank, in rank order; each rank must come to some point.

    Args:
        comm: who meets.
        point: where this rank is in its training.
        value: what it brings; anything that pickles.
    """
    return comm.allgather_object((point, value), "hvdext.metrics.meeting")


def meet(comm: Communicator, point: str, value: Any) -> list:
    """Returns every rank's value, in rank order.

    Raises:
        ValueError: on every rank alike, if the ranks are not at the same point.
    """
    everyone = gather(comm, point, value)
    check_points(comm, [found for found, _ in everyone])
    return [value for _, value in everyone]


def raise_of_rank_0(comm: Communicator, failure: Told | None, what: str, own: Exception | None) -> None:
    """Raises on all ranks if rank 0's callback has failed: there its own error, elsewhere one of its kind.

    Args:
        comm: who has met.
        failure: what rank 0 has told of it; None if it has not failed.
        what: for the message: what has failed.
        own: the callback's error, on rank 0.
    """
    try:
        raise_for(comm.ranks, [failure] + [None] * (comm.size - 1), what, None)
    except Exception as error:
        if own is None:
            raise
        raise own from error


def check_points(comm: Communicator, points: list[str]) -> None:
    """Refuses ranks that are at different points.

    Raises:
        ValueError: on every rank alike, saying which rank is where.
    """
    if len(set(points)) > 1:
        facts = [{"point": point} for point in points]
        subject = "where their callbacks are (do all ranks have the same callbacks, epochs and validation?)"
        raise ValueError(agreement.disagreement(subject, facts, comm.ranks))
