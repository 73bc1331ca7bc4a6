"""Which `ParameterSync` objects work on a model: they tell it, and who ends the training asks it."""

from __future__ import annotations

from hvdext.common.arguments import suggests_keywords

_NAME = "_hvdext_syncs"


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
