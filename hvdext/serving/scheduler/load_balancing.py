"""Which replica gets the next batch: the one that will be done with its work first. Pure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

_NEW = 0.3  # what the latest batch weighs in the mean of the seconds per row


@dataclass(eq=False)
class Load:
    """The batches that one replica has, and how fast it was so far.

    A replica that has nothing to do takes any batch. One that computes takes a second only if that is full: a
    smaller one may as well go on growing, since it could not be computed yet.

    Args:
        stages: how many batches the replica computes at a time: 1, or the stages of a pipeline.
    """

    stages: int = 1
    served: int = 0  # batches given to it so far; equal replicas take turns
    _batches: dict[int, tuple[Hashable, int]] = field(default_factory=dict)
    _seconds_per_row: dict[Hashable, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def computing(self) -> int | None:
        """The batch that it has had for longest: a single rank computes this one now."""
        return next(iter(self._batches), None)

    def takes(self, full: bool) -> bool:
        """True if the replica should be given a batch that is full, or one that is not."""
        return len(self) < (2 * self.stages if full else self.stages)

    def start(self, number: int, model: Hashable, rows: int) -> None:
        """Notes that the replica has got a batch."""
        self._batches[number] = (model, rows)
        self.served += 1

    def end(self, number: int, seconds: float | None = None) -> None:
        """Notes that a batch is done.

        Args:
            number: which.
            seconds: how long it took to compute; None if it failed.
        """
        model, rows = self._batches.pop(number)
        if seconds is not None:
            new = seconds / rows
            old = self._seconds_per_row.get(model, new)
            self._seconds_per_row[model] = _NEW * new + (1 - _NEW) * old

    def expected(self) -> tuple[float, int]:
        """Seconds, and rows, until the replica has done what it has."""
        seconds = sum(self._seconds_per_row.get(model, 0.0) * rows for model, rows in self._batches.values())
        return seconds, sum(rows for _, rows in self._batches.values())


def choose(loads: Mapping[int, Load], full: bool) -> int | None:
    """The replica for the next batch: of those that take one, the first to be done with what it has.

    The model of its cost, for a replica that has batches b of models m(b) with rows(b) rows each:

        expected [s] = sum over b of seconds_per_row[m(b)] [s/row] * rows(b) [rows]

    `seconds_per_row` is a running mean of what the replica took for the model's latest batches, where the
    latest counts for 0.3; 0 for a model it has not computed yet. Padding counts as rows. Between equal
    seconds fewer rows decide, and then fewer batches served so far. What the new batch itself will cost is
    left out: it is about the same on all of them. How far the current batch has come is not known.

    Args:
        loads: of the replicas that have the model.
        full: whether the batch is full.

    Returns:
        None if no replica should get it now.
    """
    free = [index for index, load in loads.items() if load.takes(full)]
    return min(free, key=lambda index: (loads[index].expected(), loads[index].served), default=None)


class Throughput:
    """Rows per second lately: older ones count for exponentially less.

    Args:
        seconds: after which a row counts for 1/e.
    """

    def __init__(self, seconds: float = 10.0):
        self._seconds = seconds
        self._sum = 0.0
        self._start: float | None = None
        self._last = 0.0

    def add(self, rows: int, now: float) -> None:
        """Counts rows that are done."""
        if self._start is None:
            self._start = self._last = now
        self._sum = self._sum * math.exp((self._last - now) / self._seconds) + rows
        self._last = now

    def seconds_for(self, rows: int, now: float) -> int:
        """Whole seconds until so many rows will be done, from 1 to 60."""
        if self._start is None:
            return 1
        kept = self._sum * math.exp((self._last - now) / self._seconds)
        # What has been watched for a moment only has not lost anything yet.
        watched = self._seconds * -math.expm1(-max(now - self._start, 0.1) / self._seconds)
        return min(60, max(1, math.ceil(rows * watched / kept))) if kept > 0 else 60
