"""The gradient noise scale: how many samples a batch must have before more of them stop helping.

McCandlish, Kaplan, Amodei and the OpenAI Dota Team, "An Empirical Model of Large-Batch Training" (2018,
arXiv:1812.06162), appendix A.1. Ranks that have trained apart give both batches that it takes: each rank's
movement comes from a small one, their mean from a big one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from hvdext.sync.engine.engine import Exchanged
from hvdext.sync.engine.report import FINITE, STEP, WEIGHT
from hvdext.sync.pieces import Piece
from hvdext.sync.rule import Mean, Outer
from hvdext.sync.settings import Settings


def estimates(
    small_square: float, big_square: float, small_batch: float, big_batch: float
) -> tuple[float, float]:
    """Estimates, without bias, the true gradient G and how much samples' gradients scatter around it.

        |G|^2     = (B_big |G_big|^2 - B_small |G_small|^2) / (B_big - B_small)
        tr(Sigma) = (|G_small|^2 - |G_big|^2) / (1 / B_small - 1 / B_big)

    Args:
        small_square: |G_small|^2, the squared norm of a gradient over `small_batch` samples, or the mean of
            several such.
        big_square: |G_big|^2, over `big_batch` samples.
        small_batch: B_small, in samples.
        big_batch: B_big, more samples than `small_batch`.

    Returns:
        |G|^2, which may come out negative, and tr(Sigma). The noise scale is tr(Sigma) / |G|^2, in samples.
    """
    square = (big_batch * big_square - small_batch * small_square) / (big_batch - small_batch)
    noise = (small_square - big_square) / (1 / small_batch - 1 / big_batch)
    return square, noise


class NoiseScale:
    """tr(Sigma) / |G|^2 of exponential moving averages: the ratio of two single estimates is biased.

    Args:
        decay: of the averages, for each new estimate.
    """

    def __init__(self, decay: float = 0.9):
        self._decay = decay
        self._sums: dict[Hashable, np.ndarray] = {}  # by part: of the weights, |G|^2 and tr(Sigma)

    def add(self, part: Hashable, square: float, noise: float) -> None:
        """Takes in estimates for one part of the gradient's elements."""
        before = self._sums.get(part, np.zeros(3))
        self._sums[part] = self._decay * before + [1.0, square, noise]

    @property
    def value(self) -> float:
        """In samples, over all parts; NaN without estimates, or where noise hides the gradient altogether."""
        square, noise = sum((sums[1:] / sums[0] for sums in self._sums.values()), np.zeros(2))
        return float(noise / square) if square > 0 else math.nan


def is_defined(settings: Settings) -> bool:
    """Whether ranks begin each round at the same values and end it with a plain mean of their movements."""
    rule = settings.rule
    starts_from_mean = isinstance(rule, Mean) or (isinstance(rule, Outer) and rule.alpha == 0)
    return starts_from_mean and settings.whom.shares_reference and not settings.when.is_asynchronous


class Rounds:
    """The rounds of one fragment, and what each says of the noise.

    A rank's movement in a round is minus the sum of its gradients, times the learning rate; divided by the
    round's steps it stands for one gradient over all of the round's samples. That is exact for plain SGD
    while the weights move little. With momentum or an adaptive optimizer it is the noise of the movements.

    Args:
        settings: of the sync, for which `is_defined` holds.
        pieces: of the fragment; only trainable ones count.
    """

    def __init__(self, settings: Settings, pieces: Sequence[Piece]):
        # Steps that run beside an exchange are lost where everybody takes the outer optimizer's values.
        self._loses_delayed_steps = isinstance(settings.rule, Outer)
        self._ends = np.cumsum([piece.size for piece in pieces])[:-1]
        self._counts = np.array([piece.kind == "trainable" for piece in pieces])
        self._begun: np.ndarray | None = None  # each rank's step

    def end(self, exchanged: Exchanged, batch: float) -> tuple[float, float] | None:
        """What the round that this exchange has ended says.

        Args:
            exchanged: the exchange.
            batch: samples per step and rank.

        Returns:
            |G|^2 and tr(Sigma); None where that is unknown: in the first round, whose beginning nobody has
            seen, and where ranks have trained differently or fewer than two can be compared.
        """
        outcome, begun = exchanged.outcome, self._begun
        assert outcome.squares is not None
        assert outcome.mean_square is not None
        self._begun = outcome.table[:, STEP] + exchanged.staleness * self._loses_delayed_steps
        finite = outcome.table[:, FINITE] > 0
        ranks, weights = int(finite.sum()), outcome.table[finite, WEIGHT]
        if begun is None or ranks < 2 or np.ptp(weights) > 0 or not batch or not self._counts.any():
            return None
        steps = outcome.table[:, STEP] - begun
        if np.ptp(steps) > 0 or steps[0] <= 0:
            return None
        mean = outcome.mean_square
        if not self._counts.all():
            parts = np.split(np.square(outcome.mean.numpy(), dtype=np.float64), self._ends)
            mean = sum(float(part.sum()) for part, counts in zip(parts, self._counts, strict=True) if counts)
        # The mean squared norm of vectors is that of their mean, and their mean squared distance to it.
        distance = float(outcome.squares[finite][:, self._counts].sum(axis=1).mean())
        small_batch = batch * float(steps[0])
        per_step = float(steps[0]) ** 2
        return estimates((mean + distance) / per_step, mean / per_step, small_batch, ranks * small_batch)
