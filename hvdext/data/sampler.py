"""Who gets which sample: pure arithmetic on positions, the same on every rank.

An epoch is an order of all M samples. It is cut or wrapped to the `used` positions that go around
evenly, and these are dealt to S ranks which take batches of B samples each:

    scatter: rank r takes positions r, r + S, r + 2S, ...
    slice:   rank r takes one contiguous block

Hence with scatter the k-th batches of all ranks are together positions k*S*B to (k+1)*S*B - 1: the
batch that one process with batch size S*B takes in its k-th step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdext.common.checks import require_choice, require_rank, require_whole

MODES = ("scatter", "slice")
UNEVEN = ("drop", "repeat", "keep")


@dataclass(frozen=True)
class Order:
    """The order of samples in each epoch, the same on every rank.

    Attributes:
        seed: non-negative integer from which every epoch's permutation is derived, or None for
            the order in which the samples come.
    """

    seed: int | None

    def positions(self, total: int, epoch: int) -> np.ndarray:
        """All `total` samples in the order of `epoch`: int64 array of shape (total,)."""
        if self.seed is None:
            return np.arange(total)
        return np.random.default_rng([self.seed, epoch]).permutation(total)

    def shuffle_seed(self, epoch: int) -> int:
        """A seed in [0, 2**31) for a shuffle that is done elsewhere; 0 without shuffling."""
        if self.seed is None:
            return 0
        return int(np.random.default_rng([self.seed, epoch]).integers(2**31))


@dataclass(frozen=True)
class Share:
    """Which part of every epoch this process takes.

    Attributes:
        rank: this process, in [0, size).
        size: number of ranks.
        mode: "scatter" or "slice".
        uneven: "drop", "repeat" or "keep"; see `hvdext.data.shard`.
        order: the order of samples per epoch.
    """

    rank: int
    size: int
    mode: str
    uneven: str
    order: Order

    def __post_init__(self) -> None:
        require_rank(self.rank, self.size)
        require_choice("mode", self.mode, MODES)
        require_choice("uneven", self.uneven, UNEVEN)

    def sampler(self, total: int, batch_size: int, unit: str) -> Sampler:
        """Deals the `total` units ("samples", "elements" or "batches") in the argument `x`."""
        return Sampler(total, batch_size, self.size, self.mode, self.uneven, unit, "x")


@dataclass(frozen=True)
class Sampler:
    """One epoch of `total` units, dealt to `size` ranks in equally many steps.

    Attributes:
        total: units in the data, at least `size`.
        batch_size: units that a rank takes per step.
        size: number of ranks.
        mode: "scatter" or "slice".
        uneven: "drop", "repeat" or "keep".
        unit: what is dealt, for messages.
        argument: the caller's argument that `total` comes from, for messages.

    Raises:
        ValueError: if the units cannot be dealt so that every rank gets some. It depends on what
            all ranks know, so all of them raise the same.
    """

    total: int
    batch_size: int
    size: int
    mode: str = "scatter"
    uneven: str = "drop"
    unit: str = "samples"
    argument: str = "num_samples"

    def __post_init__(self) -> None:
        require_whole("batch_size", self.batch_size, 1)
        require_whole("size", self.size, 1)
        require_choice("mode", self.mode, MODES)
        require_choice("uneven", self.uneven, UNEVEN)
        if self.total < self.size:
            raise ValueError(
                f"`{self.argument}` must hold at least as many {self.unit} as there are ranks. "
                f"Received: {self.total} {self.unit} for size={self.size}."
            )
        if self.steps == 0:
            raise ValueError(
                f"`batch_size` must be at most {self.total} {self.unit} // {self.size} ranks = "
                f"{self.total // self.size} with uneven='drop', which uses full batches only "
                f"(uneven='repeat' fills them, uneven='keep' makes a smaller one). "
                f"Received: batch_size={self.batch_size!r}."
            )

    @property
    def steps(self) -> int:
        """Batches per epoch, the same number on every rank."""
        full, rest = divmod(self.total, self.batch_size * self.size)
        extra = {"drop": False, "repeat": rest > 0, "keep": rest >= self.size}
        return full + extra[self.uneven]

    @property
    def used(self) -> int:
        """Units that all ranks together take per epoch, repeated ones included."""
        if self.uneven == "keep":
            return self.total
        return self.steps * self.batch_size * self.size

    @property
    def dropped(self) -> int:
        """Units that no rank takes in an epoch."""
        return max(self.total - self.used, 0)

    @property
    def repeated(self) -> int:
        """Units that are taken once more in an epoch."""
        return max(self.used - self.total, 0)

    def count(self, rank: int) -> int:
        """Units that `rank` takes per epoch."""
        return _block(self.used, rank, self.size)[1]

    def start(self, rank: int) -> int:
        """Position at which the block of `rank` starts in mode "slice"."""
        return _block(self.used, rank, self.size)[0]

    def last_batch_size(self, rank: int) -> int:
        """Units in the last batch that `rank` takes in an epoch."""
        return self.count(rank) - (self.steps - 1) * self.batch_size

    def of_rank(self, rank: int, order: np.ndarray) -> np.ndarray:
        """The units that `rank` takes, in its order, given the epoch's order of all of them."""
        dealt = samples_of_rank(self.used, rank, self.size, self.mode)
        return order[dealt % self.total]


def samples_of_rank(num_samples: int, rank: int, size: int, mode: str = "scatter") -> np.ndarray:
    """Indices of the samples that belong to one rank if all of them are dealt in order.

    Ranks' counts differ by one at most; the lower ranks have the larger ones.

    Args:
        num_samples: samples in the whole data set, at least 0.
        rank: the rank, in [0, size).
        size: number of ranks, at least 1.
        mode: "scatter" for r, r + size, r + 2 * size, ...; "slice" for a contiguous block.

    Returns:
        int64 array of ascending indices; all ranks' arrays together are `range(num_samples)`.

    Raises:
        ValueError: if an argument is out of its range.
    """
    require_whole("num_samples", num_samples, 0)
    require_rank(rank, size)
    require_choice("mode", mode, MODES)
    if mode == "scatter":
        return np.arange(rank, num_samples, size)
    start, count = _block(num_samples, rank, size)
    return np.arange(start, start + count)


def steps_per_epoch(num_samples: int, batch_size: int, size: int, uneven: str = "drop") -> int:
    """Batches that every rank takes per epoch of data sharded by `shard`.

        drop: floor(M / (S*B))    repeat: ceil(M / (S*B))
        keep: ceil, but floor where fewer than S samples remain for the last step

    Args:
        num_samples: samples in the whole data set, M, at least `size`.
        batch_size: samples in one batch of one rank, B, at least 1.
        size: number of ranks, S, at least 1.
        uneven: "drop", "repeat" or "keep".

    Raises:
        ValueError: if an argument is out of its range or leaves a rank without a batch.
    """
    require_whole("num_samples", num_samples, 0)
    return Sampler(num_samples, batch_size, size, uneven=uneven).steps


def last_batch_sizes(num_samples: int, batch_size: int, size: int, uneven: str = "keep") -> tuple[int, ...]:
    """Samples in the last batch of an epoch, for each rank in rank order.

    They differ, by one at most, only with uneven="keep"; `batch_weights` turns them into weights.

    Args:
        num_samples: samples in the whole data set, at least `size`.
        batch_size: samples in every other batch of one rank, at least 1.
        size: number of ranks, at least 1.
        uneven: "drop", "repeat" or "keep".

    Raises:
        ValueError: if an argument is out of its range or leaves a rank without a batch.
    """
    require_whole("num_samples", num_samples, 0)
    sampler = Sampler(num_samples, batch_size, size, uneven=uneven)
    return tuple(sampler.last_batch_size(rank) for rank in range(size))


def _block(total: int, rank: int, size: int) -> tuple[int, int]:
    """Start and length of the contiguous block of `rank`; the first ones are longer by one."""
    base, extra = divmod(total, size)
    return rank * base + min(rank, extra), base + (rank < extra)
