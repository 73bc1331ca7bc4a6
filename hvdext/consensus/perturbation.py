"""Candidates for the warm-up: noise on a part of the weights, and what their scores make of them.

NumPy only. Each candidate follows from the weights and four numbers (seed, round, rank, place of the
variable), so that any process can work out any rank's candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdext.common.checks import require_choice, require_number, require_whole

DISTRIBUTIONS = ("normal", "uniform")


@dataclass(frozen=True)
class Perturbation:
    """Noise on some elements of each tensor, in proportion to the tensor's standard deviation.

    A tensor whose elements are all equal, such as biases that begin at zero or a single number, has no
    deviation and stays as it is.

    Args:
        fraction: the part of each tensor's elements that gets noise, in (0, 1]: the nearest whole number of
            elements, at least one.
        scale: the noise's standard deviation, in standard deviations of the tensor; above 0.
        distribution: "normal" or "uniform" (between plus and minus `sqrt(3) * scale` deviations, which have
            the same standard deviation).
        seed: a whole number from 0 on.

    Raises:
        ValueError: if an argument breaks its rule.
    """

    fraction: float = 0.1
    scale: float = 0.1
    distribution: str = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        fraction = require_number("fraction", self.fraction, lambda part: 0 < part <= 1, "lie in (0, 1]")
        scale = require_number("scale", self.scale, lambda scale: 0 < scale < math.inf, "be a number above 0")
        require_choice("distribution", self.distribution, DISTRIBUTIONS)
        # Python's own numbers: ranks compare them by how they print.
        object.__setattr__(self, "fraction", fraction)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "seed", require_whole("seed", self.seed, 0))

    def count(self, size: int) -> int:
        """How many elements of a tensor of `size` elements get noise."""
        return min(size, max(1, math.floor(self.fraction * size + 0.5)))

    def candidate(self, weights: Mapping[int, np.ndarray], *, turn: int, rank: int) -> dict[int, np.ndarray]:
        """Returns `weights` with rank `rank`'s noise of round `turn` on them, in their own dtypes.

        Args:
            weights: tensors of real numbers by the place of their variable among the model's trainable
                variables. What a tensor gets depends on its own place only, not on the others.
            turn: the round, from 0.
            rank: whose candidate.
        """
        return {
            place: self._noisy(value, np.random.default_rng([self.seed, turn, rank, place]))
            for place, value in weights.items()
        }

    def _noisy(self, value, generator):
        spread = deviation(value)
        if spread == 0:
            return value.copy()
        noisy = value.astype(np.float64).ravel()
        where = generator.choice(noisy.size, self.count(noisy.size), replace=False, shuffle=False)
        if self.distribution == "normal":
            noise = generator.normal(0.0, self.scale * spread, where.size)
        else:
            bound = math.sqrt(3) * self.scale * spread
            noise = generator.uniform(-bound, bound, where.size)
        noisy[where] += noise
        with np.errstate(over="ignore"):  # the caller looks for infinite weights, with their layers' names
            return noisy.reshape(value.shape).astype(value.dtype)


def deviation(value: np.ndarray) -> float:
    """The standard deviation of all elements; exactly 0 if they are all equal, whatever the rounding."""
    wide = value.astype(np.float64)
    return 0.0 if wide.size == 0 or wide.min() == wide.max() else float(np.std(wide))


def best(scores: Sequence[float]) -> int | None:
    """The place of the lowest finite score, the first of several; None if no score is finite."""
    finite = [place for place, score in enumerate(scores) if math.isfinite(score)]
    return min(finite, key=lambda place: scores[place]) if finite else None


def quality(scores: Sequence[float]) -> list[float]:
    """Weights of a mean, better scores weighing more: the softmax of the negative scores.

    Candidate r weighs `exp(-score_r) / sum over k of exp(-score_k)`: for cross-entropy in proportion to the
    likelihood of the probe's labels. A score that is not finite weighs 0.

    Returns:
        The weights, whose sum is 1.

    Raises:
        ValueError: if no score is finite.
    """
    # Relative to the best: exp of large losses would be 0 for all.
    lowest = min(score for score in scores if math.isfinite(score))
    parts = [math.exp(lowest - score) if math.isfinite(score) else 0.0 for score in scores]
    total = math.fsum(parts)
    return [part / total for part in parts]
