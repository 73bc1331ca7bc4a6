"""Who computes which batches: pure arithmetic of numbers that every rank knows.

Batches are dealt in rounds. In each, rank r takes a run of consecutive batches, the runs lie in rank order
and the rounds follow each other: what comes back is in input order by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BYTES_PER_RANK = 8 * 2**20  # of predictions, in one round
BYTES_PER_ROUND = 64 * 2**20  # of all ranks together: rank 0 holds a few rounds
SECONDS_PER_ROUND = 0.5  # how often progress is shown and saved
_GROWTH = 8  # of the runs, from one round to the next


@dataclass(frozen=True)
class Run:
    """Consecutive batches, `start` to `stop` - 1."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def evenly(start: int, count: int, ranks: int) -> list[Run]:
    """`count` batches from `start` on as one run per rank; their lengths differ by at most one."""
    least, more = divmod(count, ranks)
    runs = []
    for rank in range(ranks):
        stop = start + least + (rank < more)
        runs.append(Run(start, stop))
        start = stop
    return runs


def next_runs(start: int, total: int | None, ranks: int, limit: int) -> list[Run]:
    """The runs of the next round.

    Args:
        start: the first batch that no round has had.
        total: batches in all; None: not known.
        ranks: how many.
        limit: batches of a run, at the most.
    """
    count = limit * ranks if total is None else min(limit * ranks, total - start)
    return evenly(start, count, ranks)


class Pace:
    """How long the runs of the next round may be: every rank works it out from the same reports.

    Attributes:
        limit: batches. One in the first round, when nothing is known of the predictions' size.
    """

    def __init__(self, ranks: int):
        self.limit = 1
        self._bytes = min(BYTES_PER_RANK, BYTES_PER_ROUND // ranks)

    def observe(self, batches: Sequence[int], sizes: Sequence[int], seconds: Sequence[float]) -> None:
        """Learns from one round.

        Args:
            batches: that each rank has computed.
            sizes: bytes of each rank's predictions.
            seconds: that each rank has computed for.
        """
        found = [one for one in zip(batches, sizes, seconds, strict=True) if one[0]]
        if not found:
            return
        largest = max(size / count for count, size, _ in found)
        slowest = max(time / count for count, _, time in found)
        fitting = min(self._bytes / max(largest, 1), SECONDS_PER_ROUND / max(slowest, 1e-6))
        self.limit = max(1, min(int(fitting), _GROWTH * self.limit))
