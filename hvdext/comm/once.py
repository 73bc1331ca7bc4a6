"""What is done once for a model, and anew when other ranks take part."""

from __future__ import annotations

import weakref

from hvdext.comm.communicator import Communicator


class Once:
    """Remembers for which model something has been done while the ranks stay joined; keeps none alive."""

    def is_done(self, model, comm: Communicator) -> bool:
        """True if it has been done for `model`, and the engine has not been restarted since."""
        return self in _models(comm) and _models(comm)[self]() is model

    def note(self, model, comm: Communicator) -> None:
        """It has been done for `model`."""
        _models(comm)[self] = weakref.ref(model)


def _models(comm) -> weakref.WeakKeyDictionary[Once, weakref.ref]:
    return comm.ledger.notes.setdefault(Once, weakref.WeakKeyDictionary())
