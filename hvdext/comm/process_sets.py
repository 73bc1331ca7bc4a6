"""A named part of the ranks, as in Horovod: `hvd.ProcessSet([0, 2])`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from hvdext.comm.build_info import mpi_built
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import is_whole


class ProcessSet:
    """Some of the ranks, for collectives among themselves.

    Register it on all ranks, in the same order, with `hvd.init(process_sets=[...])` or
    `hvd.add_process_set()`, then pass it as `process_set=`. Two sets of the same ranks are
    interchangeable: registering one registers both.

    Args:
        ranks_or_comm: global ranks, distinct and not negative; or an mpi4py communicator, where Horovod
            runs on MPI.

    Attributes:
        mpi_comm: the communicator it was made of, or None.

    Raises:
        ValueError: if the ranks are none, repeat themselves or are not ranks; or for a communicator where
            Horovod has no MPI.
    """

    @suggests_keywords
    def __init__(self, ranks_or_comm: Iterable[int] | Any):
        self.mpi_comm = None
        self._ranks: tuple[int, ...] | None = None
        if is_mpi_communicator(ranks_or_comm):
            require_mpi("ranks_or_comm")
            self.mpi_comm = ranks_or_comm
            return
        members = list(ranks_or_comm) if isinstance(ranks_or_comm, Iterable) else [ranks_or_comm]
        if not isinstance(ranks_or_comm, Iterable) or not are_ranks(members) or not members:
            raise ValueError(
                "`ranks_or_comm` must be distinct, non-negative integers, at least one, or an mpi4py "
                f"communicator. Received: ranks_or_comm={_printed(ranks_or_comm, members)}."
            )
        self._ranks = tuple(sorted(map(int, members)))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members' global ranks, in ascending order.

        Raises:
            RuntimeError: for a set made of a communicator, before `hvd.init()` has registered it.
        """
        if self._ranks is None:
            raise RuntimeError(
                "The ranks of a ProcessSet made of an mpi4py communicator are known once it is registered: "
                "pass it to `hvd.init(comm=..., process_sets=[...])`."
            )
        return self._ranks

    @property
    def process_set_id(self) -> int | None:
        """The engine's number of the set: 0 for all ranks, None while it is not registered."""
        if self._ranks is None:
            return None
        return registered_sets().get(self._ranks)

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

    def learn_ranks(self, ranks: Iterable[int]) -> None:
        """Tells a set made of a communicator which ranks the engine found in it."""
        self._ranks = tuple(sorted(ranks))

    def __repr__(self) -> str:
        return f"ProcessSet({self.mpi_comm!r})" if self._ranks is None else f"ProcessSet({list(self._ranks)})"


class _GlobalProcessSet(ProcessSet):
    """All ranks of the job that `hvd.init()` has joined."""

    def __init__(self) -> None:
        self.mpi_comm = None

    @property
    def ranks(self) -> tuple[int, ...]:
        return current().ranks

    @property
    def process_set_id(self) -> int | None:
        return 0  # Horovod's, also before init

    def __repr__(self) -> str:
        return "hvd.global_process_set"


global_process_set: ProcessSet = _GlobalProcessSet()


def registered_sets() -> dict[tuple[int, ...], int]:
    """Maps the ranks of each registered set to the engine's number of it; empty before `hvd.init()`."""
    try:
        return current().registered_sets()
    except RuntimeError:
        return {}


def are_ranks(members: list) -> bool:
    """True if `members` are distinct, non-negative integers."""
    return all(is_whole(member, 0) for member in members) and len(set(members)) == len(members)


def is_mpi_communicator(value: object) -> bool:
    """True for an mpi4py communicator. Does not import mpi4py: that would start MPI."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and isinstance(value, module.Comm)


def require_mpi(argument: str) -> None:
    """Refuses an mpi4py communicator where Horovod does not run on MPI.

    Args:
        argument: whose value the communicator is, for the message.

    Raises:
        ValueError: if Horovod was built without MPI, or is not installed.
    """
    if not mpi_built():
        raise ValueError(
            f"`{argument}` must hold ranks, such as hvd.ProcessSet([0, 1]), where Horovod is built without "
            f"MPI. Received: {argument}=an mpi4py communicator."
        )


def _printed(received, members):
    return members if isinstance(received, Iterable) else repr(received)


def _global_rank() -> int:
    comm = current()
    return comm.ranks[comm.rank]
