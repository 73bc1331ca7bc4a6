"""With whom: which ranks meet in turn k, from the settings and k alone, so that all of them know.

Where ranks meet as peers, each takes the plain mean of its own vector and those it receives. Over all ranks
that is a mixing matrix W, row i holding the weights with which rank i mixes. In every answer here the
columns of W add up to one as its rows do, so that the mean of all ranks stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdext.comm.communicator import Communicator
from hvdext.comm.process_sets import ProcessSet, are_ranks
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import is_whole, require_whole


@dataclass(frozen=True)
class Turn:
    """Whom this rank meets in one turn.

    Attributes:
        comm: the ranks that meet.
        send_to: places within `comm` that get this rank's values; None: all of `comm` form one mean.
        receive_from: places within `comm` whose values this rank gets; None as `send_to`.
    """

    comm: Communicator
    send_to: tuple[int, ...] | None = None
    receive_from: tuple[int, ...] | None = None


class Whom:
    """Base of the answers to "with whom".

    Attributes:
        shares_reference: True if those who meet have always met with each other only: whatever they have
            agreed on before, such as an outer optimizer's centre, is the same on all of them.
    """

    shares_reference = False

    def check(self, comm: Communicator) -> None:
        """Looks whether this answer fits the ranks of `comm`.

        Raises:
            ValueError: if it does not.
        """

    def turn(self, comm: Communicator, number: int) -> Turn:
        """Whom this rank meets.

        Args:
            comm: all ranks that take part; `check` has accepted them.
            number: which turn, from 0; the same on all ranks.
        """
        raise NotImplementedError

    def peers(self, size: int) -> int | None:
        """How many ranks each one receives from per turn among `size`; None: all who meet form one mean."""
        return None


@dataclass(frozen=True)
class Everyone(Whom):
    """All ranks, every time."""

    shares_reference = True

    def turn(self, comm: Communicator, number: int) -> Turn:
        """As in `Whom`."""
        return Turn(comm)


@suggests_keywords
@dataclass(frozen=True, eq=False)
class Group(Whom):
    """The ranks of one process set, every time; the sets of other ranks go their own ways.

    With one rank in all, it is that rank's group whatever the set.

    Args:
        process_set: registered, with this rank in it. Different ranks may name different sets, as long as no
            rank is in two of them. Every rank needs one: who trains alone names a set of its own.

    Raises:
        TypeError: if it is no `hvd.ProcessSet`.
        ValueError: when the ranks' first sync begins, on all of them alike, if a rank is not in its set, sets
            overlap or some ranks answer otherwise.
    """

    process_set: ProcessSet

    shares_reference = True

    def __post_init__(self):
        if not isinstance(self.process_set, ProcessSet):
            raise TypeError(
                f"`process_set` must be a hvd.ProcessSet. Received: process_set={self.process_set!r}."
            )

    def check(self, comm: Communicator) -> None:
        """As in `Whom`."""
        if comm.size > 1:
            _require_among("process_set", self.process_set.ranks, comm)
            comm.subset(self.process_set.ranks)

    def turn(self, comm: Communicator, number: int) -> Turn:
        """As in `Whom`."""
        return Turn(comm if comm.size == 1 else comm.subset(self.process_set.ranks))

    def __eq__(self, other: object) -> bool:
        # Two sets of the same ranks are interchangeable.
        return isinstance(other, Group) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@suggests_keywords
@dataclass(frozen=True)
class Pairs(Whom):
    """Two by two, dealt anew at random every turn, from a seed that all ranks share.

    The random gossip of AD-PSGD (Lian et al. 2018, arXiv:1710.06952). Each turn's W is symmetric: 1/2 for
    the rank itself and for its partner.

    Args:
        seed: at least 0.

    Raises:
        ValueError: if `seed` is none; from `check`, if the number of ranks is odd.
    """

    seed: int = 0

    def __post_init__(self):
        # Python's own number: ranks compare answers by how they print.
        object.__setattr__(self, "seed", require_whole("seed", self.seed, 0))

    def check(self, comm: Communicator) -> None:
        """As in `Whom`."""
        if comm.size % 2:
            raise ValueError(
                f"`whom={self}` needs an even number of ranks, so that each has a partner. "
                f"Received: {comm.size} {'rank' if comm.size == 1 else 'ranks'}."
            )

    def turn(self, comm: Communicator, number: int) -> Turn:
        """As in `Whom`."""
        line = np.random.default_rng([self.seed, number]).permutation(comm.size).tolist()
        # Neighbours in the line are partners: places 0 and 1, 2 and 3, ...
        partner = line[line.index(comm.rank) ^ 1]
        return Turn(comm, (partner,), (partner,))

    def peers(self, size: int) -> int:
        """As in `Whom`."""
        return 1


@dataclass(frozen=True)
class Ring(Whom):
    """Both neighbours on a ring, every time; with two ranks the other one.

    The fixed graph of D-PSGD (Lian et al. 2017, arXiv:1705.09056): W is symmetric, with 1/3 for the rank
    itself and for each neighbour.
    """

    def turn(self, comm: Communicator, number: int) -> Turn:
        """As in `Whom`."""
        neighbours = {(comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size} - {comm.rank}
        peers = tuple(sorted(neighbours))
        return Turn(comm, peers, peers)

    def peers(self, size: int) -> int:
        """As in `Whom`."""
        return min(size - 1, 2)


@dataclass(frozen=True)
class Exponential(Whom):
    """One peer per turn, at distances 1, 2, 4, ... around the ring, then from the start.

        in turn k rank i sends to i + d and receives from i - d (mod n),  d = 2^(k mod ceil(log2 n))

    The one-peer exponential graph of stochastic gradient push (Assran et al. 2019, arXiv:1811.10792). For n a
    power of two, log2(n) turns in a row give every rank the exact mean (Ying et al. 2021, arXiv:2110.13363).
    W is not symmetric: 1/2 for the rank itself and for the one it receives from.
    """

    def turn(self, comm: Communicator, number: int) -> Turn:
        """As in `Whom`."""
        if comm.size == 1:
            return Turn(comm, (), ())
        distances = (comm.size - 1).bit_length()  # ceil(log2 n)
        distance = 2 ** (number % distances)
        return Turn(comm, ((comm.rank + distance) % comm.size,), ((comm.rank - distance) % comm.size,))

    def peers(self, size: int) -> int:
        """As in `Whom`."""
        return min(size - 1, 1)


@dataclass(frozen=True)
class Hierarchical(Whom):
    """Within groups, such as the ranks of one host, every turn; over all ranks every `every`-th.

    Local SGD on two levels (Lin et al. 2020, arXiv:1808.07217, hierarchical local SGD). With one rank in
    all there is nothing to do, whatever the groups.

    Args:
        groups: process sets or lists of ranks, each rank in exactly one; register them with
            `hvd.init(process_sets=[...])`.
        every: at least 1; turns `every` - 1, 2 `every` - 1, ... (from 0) are over all ranks.

    Raises:
        ValueError: if an argument breaks its rule; from `check`, if the groups are not all of the ranks.
    """

    groups: tuple[tuple[int, ...], ...]
    every: int

    @suggests_keywords
    def __init__(self, groups: Sequence[ProcessSet | Sequence[int]], every: int):
        object.__setattr__(self, "every", require_whole("every", every, 1))
        object.__setattr__(self, "groups", _disjoint(groups))

    def check(self, comm: Communicator) -> None:
        """As in `Whom`."""
        if comm.size == 1:
            return
        members = sorted(rank for group in self.groups for rank in group)
        if members != sorted(comm.ranks):
            raise ValueError(
                f"`groups` must hold all of the ranks {sorted(comm.ranks)} and no others. "
                f"Received: groups={_listed(self.groups)}."
            )
        comm.subset(self._own_group(comm).ranks)

    def turn(self, comm: Communicator, number: int) -> Turn:
        """As in `Whom`."""
        if comm.size == 1 or (number + 1) % self.every == 0:
            return Turn(comm)
        return Turn(comm.subset(self._own_group(comm).ranks))

    def _own_group(self, comm):
        rank = comm.ranks[comm.rank]
        return ProcessSet(next(group for group in self.groups if rank in group))


def _disjoint(groups) -> tuple[tuple[int, ...], ...]:
    rule = "`groups` must be process sets or lists of ranks, none of them empty, no rank in two of them."
    try:
        lists = [list(group.ranks if isinstance(group, ProcessSet) else group) for group in groups]
    except TypeError:
        raise ValueError(f"{rule} Received: groups={groups!r}.") from None
    lists = [[int(rank) if is_whole(rank, 0) else rank for rank in ranks] for ranks in lists]
    if not lists or not all(lists) or not are_ranks([rank for ranks in lists for rank in ranks]):
        raise ValueError(f"{rule} Received: groups={_listed(lists)}.")
    return tuple(tuple(sorted(ranks)) for ranks in lists)


def _listed(groups):
    return [list(group) for group in groups]


def _require_among(argument, ranks, comm):
    if not set(ranks) <= set(comm.ranks):
        raise ValueError(
            f"`{argument}` must hold some of the ranks {list(comm.ranks)} only. "
            f"Received: {argument}={list(ranks)}."
        )
