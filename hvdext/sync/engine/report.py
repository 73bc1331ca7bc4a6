"""What a rank tells the others of itself with each exchange, as named values and as numbers on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The places of the values in a row, and the columns of the table of all ranks' rows.
WEIGHT, FINITE, STEP, OVERHEAD, STOPS, FINISHED = range(6)


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank's report; whether its values are finite is found out on the way, and added there.

    Attributes:
        weight: how much its values count in the mean.
        step: how many steps it has trained.
        overhead: the share of time that its training has waited for exchanges.
        stops: whether it asks all ranks to end their training.
        finished: whether its own training has ended.
    """

    weight: float
    step: int
    overhead: float = 0.0
    stops: bool = False
    finished: bool = False

    def row(self) -> np.ndarray:
        """The row that travels, float64 of shape (6,): 0 where it will say that the values are finite."""
        row = np.zeros(6)
        row[[WEIGHT, STEP, OVERHEAD, STOPS, FINISHED]] = self.saved()
        return row

    def saved(self) -> list[float]:
        """The numbers that a checkpoint holds of a report on its way."""
        return [self.weight, self.step, self.overhead, self.stops, self.finished]

    @classmethod
    def of_saved(cls, numbers: Sequence[float]) -> Report:
        """The report of which `saved` has made `numbers`."""
        weight, step, overhead, stops, finished = map(float, numbers)
        return cls(
            weight=weight, step=int(step), overhead=overhead, stops=bool(stops), finished=bool(finished)
        )
