"""Names for the collectives of syncs: the same on all ranks, and never shared by two syncs at once.

Two exchanges of one name that are on their way together would mix the values of different variables. A name
is taken for as long as its engine lives: that of a sync without `end()`, of another model, or one whose
thread has not heard yet that its training has failed may still exchange.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Collection, Iterator

from hvdext.comm.communicator import Communicator
from hvdext.sync.engine.engine import Engine

_RULE = re.compile(r"[A-Za-z0-9_-]+")  # what a collective's name may consist of

# The note of the names taken: ranks that join another job have no engines of an earlier one.
_TAKEN = "hvdext.sync: names by engine"


def check_name(name: object) -> None:
    """Refuses a name that no collective can have.

    Raises:
        ValueError: unless `name` is None or made of letters, digits, "_" and "-".
    """
    if name is not None and not (isinstance(name, str) and _RULE.fullmatch(name)):
        raise ValueError(
            f"`name` must be one or more of the characters A-Z, a-z, 0-9, _ and -. Received: name={name!r}."
        )


def free_number(taken: Collection[str | None]) -> str:
    """The first of "0", "1", ... that is not taken."""
    return _first_free(map(str, itertools.count()), taken)


def agree(comm: Communicator, name: str | None) -> str:
    """A name that no living engine of any of the ranks has; every rank of `comm` must call it.

    Args:
        comm: who exchanges under the name.
        name: the one wished for, the same on all ranks; followed by a number where it is taken. None: a
            number alone.
    """
    mine = sorted(_taken(comm).values())
    taken = {one for names in comm.allgather_object(mine, "hvdext.sync.names") for one in names}
    if name is None:
        return free_number(taken)
    return _first_free(itertools.chain([name], (f"{name}-{i}" for i in itertools.count(1))), taken)


def take(name: str, engine: Engine) -> None:
    """Notes that `engine` exchanges under `name`, until it is gone."""
    _taken(engine.comm)[engine] = name


def _taken(comm: Communicator) -> weakref.WeakKeyDictionary[Engine, str]:
    return comm.ledger.notes.setdefault(_TAKEN, weakref.WeakKeyDictionary())


def _first_free(candidates: Iterator[str], taken: Collection[str | None]) -> str:
    return next(candidate for candidate in candidates if candidate not in taken)
