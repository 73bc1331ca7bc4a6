"""Which `ParameterSync` objects work on a model, and what each of them keeps for it."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np

from hvdext.comm.ledger import Ledger
from hvdext.common.arguments import suggests_keywords
from hvdext.sync.engine.engine import Engine
from hvdext.sync.saved_state import SavedState, hang, take_down

_NAME = "_hvdext_syncs"


@dataclass(frozen=True)
class Purpose:
    """What an engine is made for: when that changes, another one is.

    Attributes:
        ledger: of the ranks that exchange.
        pieces: (identity of the variable, start, stop) of all that is exchanged.
        measures: whether the ranks' distances are measured.
    """

    ledger: Ledger
    pieces: list[tuple[int, int | None, int | None]]
    measures: bool

    def differs_in_measuring_only(self, other: Purpose) -> bool:
        """True if an engine for `other` can take up the state of one for this."""
        return (self.ledger, self.pieces) == (other.ledger, other.pieces)


class Attachment:
    """A sync's state with one model: it begins empty, and ends when the sync is attached to another model.

    Trainings come and go meanwhile. The model's checkpoints hold the state all the time.

    Args:
        model: whose checkpoints hold the state.

    Attributes:
        model: the same.
        place: what the checkpoints call it; None until `hang`.
        engine: what exchanges; None before the model's first training.
        made_for: what `engine` was made for; None as long as there is none.
        loaded: what a checkpoint has brought and no engine has taken up yet; None: nothing.
    """

    def __init__(self, model: keras.Model):
        self.model = model
        self.place: str | None = None
        self.engine: Engine | None = None
        self.made_for: Purpose | None = None
        self.loaded: dict[str, np.ndarray] | None = None
        self._saved = SavedState(self.state, self.restore)

    def hang(self, place: str) -> None:
        """Makes the state a part of the model's checkpoints, as `place` and under no other name."""
        self.take_down()  # from its place among other syncs than today's
        self.place = place
        hang(self.model, place, self._saved)

    def take_down(self) -> None:
        """Leaves the state out of the model's later checkpoints."""
        take_down(self.model, self._saved)

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds."""
        if self.engine is None:
            return self.loaded or {}
        return self.engine.state()

    def restore(self, found: dict[str, np.ndarray]) -> None:
        """Takes up a `state` again; without an engine it is kept for the one that will be made.

        Raises:
            ValueError: if it is the state of other settings or fragments.
        """
        if self.engine is None:
            self.loaded = found
        else:
            self.engine.restore(found)
            self.loaded = None


class _Syncs:
    """A list that Keras neither wraps, tracks nor saves, since it is none of its own kinds."""

    def __init__(self) -> None:
        self.found: list = []


def attach(model, sync) -> None:
    """Notes that `sync` works on `model`, after those that already do."""
    if not hasattr(model, _NAME):
        setattr(model, _NAME, _Syncs())
    if sync not in attached(model):
        getattr(model, _NAME).found.append(sync)


def detach(model, sync) -> None:
    """Forgets that `sync` works on `model`; nothing happens if it does not."""
    if sync in attached(model):
        getattr(model, _NAME).found.remove(sync)


@suggests_keywords
def attached(model) -> list:
    """The objects attached to `model`, in the order in which they came."""
    return list(getattr(model, _NAME).found) if hasattr(model, _NAME) else []
