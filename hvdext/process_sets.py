"""A named part of the ranks, as in Horovod: `hvd.ProcessSet([0, 2])`."""

from __future__ import annotations

from collections.abc import Iterable


class ProcessSet:
    """Some of the ranks, for collectives among themselves.

    Register it on all ranks, in the same order, with `hvd.init(process_sets=[...])` or
    `hvd.add_process_set()`, then pass it as `process_set=`.

    Args:
        ranks: global ranks, distinct and not negative.

    Raises:
        ValueError: if `ranks` is empty, repeats a rank or holds something that is not a rank.
    """

    def __init__(self, ranks: Iterable[int]):
        members = list(ranks)
        valid = all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in members)
        if not members or not valid or len(set(members)) != len(members):
            raise ValueError(
                f"`ranks` must be distinct, non-negative integers, at least one. Received: ranks={members}."
            )
        self.ranks: tuple[int, ...] = tuple(sorted(members))

    def size(self) -> int:
        """How many ranks are in the set."""
        return len(self.ranks)

    def included(self) -> bool:
        """True if this rank is in the set."""
        return _global_rank() in self.ranks

    def rank(self) -> int:
        """This rank's place within the set.

        Raises:
            ValueError: if this rank is not in the set.
        """
        return self.place_of(_global_rank())

    def place_of(self, rank: int) -> int:
        """The place of global rank `rank` within the set.

        Raises:
            ValueError: if it is not in the set.
        """
        if rank not in self.ranks:
            raise ValueError(
                f"`process_set` must contain the rank that uses it. Received: {self} on rank {rank}."
            )
        return self.ranks.index(rank)

    def __repr__(self) -> str:
        return f"ProcessSet({list(self.ranks)})"


def _global_rank() -> int:
    from hvdext.comm import current

    comm = current()
    return comm.ranks[comm.rank]
