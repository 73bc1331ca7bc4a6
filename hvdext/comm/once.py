"""What is done once for a model, and anew when other ranks take part."""

from __future__ import annotations

import weakref

from hvdext.comm.communicator import Communicator


class Once:
    """Remembers for which model, and among which ranks, something has been done; keeps neither alive."""

    def __init__(self) -> None:
        self._model: weakref.ref = weakref.ref(self)
        self._ranks: weakref.ref = weakref.ref(self)  # known by their ledger

    def is_done(self, model, comm: Communicator) -> bool:
        """True if it has been done for `model`, and the engine has not been restarted since."""
        return self._model() is model and self._ranks() is comm.ledger

    def note(self, model, comm: Communicator) -> None:
        """It has been done for `model`."""
        self._model = weakref.ref(model)
        self._ranks = weakref.ref(comm.ledger)
