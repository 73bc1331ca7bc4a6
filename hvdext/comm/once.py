"""What is done once while the ranks stay joined, and anew when others take part."""

from __future__ import annotations

import weakref

from hvdext.comm.communicator import Communicator
from hvdext.common.log import warn


class Once:
    """Remembers for which model something has been done while the ranks stay joined; keeps none alive."""

    def is_done(self, model, comm: Communicator) -> bool:
        """True if it has been done for `model`, and the engine has not been restarted since."""
        return self in _models(comm) and _models(comm)[self]() is model

    def note(self, model, comm: Communicator) -> None:
        """It has been done for `model`."""
        _models(comm)[self] = weakref.ref(model)


def warn_once(comm: Communicator, message: str) -> None:
    """Warns on the first rank, if it has not been told so yet."""
    if comm.rank == 0 and not comm.ledger.notes.setdefault(message, False):
        comm.ledger.notes[message] = True
        warn(message)


def _models(comm) -> weakref.WeakKeyDictionary[Once, weakref.ref]:
    return comm.ledger.notes.setdefault(Once, weakref.WeakKeyDictionary())
