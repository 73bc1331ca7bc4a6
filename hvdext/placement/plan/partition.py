"""Cuts a row of units into runs: the optimum, by dynamic programming. Arithmetic on arrays only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def partition(costs: Sequence[np.ndarray]) -> list[int] | None:
    """Cuts n units into p runs so that the dearest run is as cheap as possible.

    Of all cuts with the same dearest run it takes the one with the smallest sum of squared costs, so that the
    other runs are even, too:

        worst(p, j) = min over i < j of max(worst(p - 1, i), cost_p(i, j));   M = worst(p, n)
        total(p, j) = min over i < j of total(p - 1, i) + cost_p(i, j)^2, where cost_p(i, j) <= M

    Args:
        costs: for each run an array of shape (n + 1, n + 1), whose element (i, j) is what units i to j - 1
            cost as that run; infinite where they may not be it, and wherever i >= j.

    Returns:
        p + 1 borders from 0 to n: run k holds units `borders[k]` to `borders[k + 1] - 1`. None if no cut is
        allowed.
    """
    limit = cheapest(costs)
    if not np.isfinite(limit):
        return None
    total = np.full(len(costs[0]), np.inf)
    total[0] = 0.0
    choices = []
    for cost in costs:
        sums = total[:, None] + np.where(cost <= limit, cost, np.inf) ** 2
        choices.append(sums.argmin(axis=0))
        total = sums.min(axis=0)
    borders = [len(total) - 1]
    for choice in reversed(choices):
        borders.append(int(choice[borders[-1]]))
    return borders[::-1]


def cheapest(costs: Sequence[np.ndarray]) -> float:
    """What the dearest run of the best cut costs; infinite if no cut is allowed. Arguments as `partition`."""
    worst = np.full(len(costs[0]), np.inf)
    worst[0] = 0.0
    for cost in costs:
        worst = np.maximum(worst[:, None], cost).min(axis=0)
    return float(worst[-1])


def run_sums(weights: np.ndarray) -> np.ndarray:
    """The sum of each run: element (i, j) is that of units i to j - 1; infinite where i >= j.

    Args:
        weights: shape (n,), float64.
    """
    # Row by row, so that equal runs have equal sums to the last bit wherever they stand in the row.
    n = len(weights)
    sums = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        sums[i, i + 1 :] = np.cumsum(weights[i:])
    return sums


def arrivals(n: int, tensors: Sequence[tuple[int, Sequence[int], int]]) -> np.ndarray:
    """What enters each run from outside, in bytes: each tensor once, however many units of the run take it.

    Args:
        n: number of units.
        tensors: (unit that returns it, units that take it, bytes); a taker may stand before the producer.

    Returns:
        Shape (n + 1, n + 1), float64; element (i, j) for the run of units i to j - 1.
    """
    change = np.zeros((n + 1, n + 2))
    for producer, consumers, size in tensors:
        before = 0
        for taker in sorted(set(consumers)):
            # Runs that begin at `before` to `taker` meet this taker first.
            later = max(before, producer + 1)
            change[later : taker + 1, taker + 1] += size
            if taker < producer:  # taken before it is made: until the run reaches the producer
                change[before : taker + 1, taker + 1] += size
                change[before : taker + 1, producer + 1] -= size
            before = taker + 1
    return np.cumsum(change, axis=1)[:, : n + 1]
