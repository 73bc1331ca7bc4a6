"""Vocabularies in a pipeline: the same on all ranks when the model is cut, the owner's in its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import keras

from hvdext.comm.communicator import Communicator
from hvdext.keras_tools.functional import Calls
from hvdext.keras_tools.vocabularies import lookup_layers, set_vocabulary_of, vocabulary_of


def vocabularies_of(calls: Calls) -> dict[str, str]:
    """What ranks compare, by what it is: a digest of each vocabulary."""
    return {
        f"vocabulary of {path!r}": hashlib.sha256(repr(vocabulary_of(layer)).encode()).hexdigest()[:8]
        for (path, _), layer in _holders(calls).items()
    }


def hand_on_vocabularies(replicas: Communicator, model: keras.Model) -> None:
    """Gives all pipelines side by side the vocabularies of the first one. All of `replicas` call it."""
    layers = lookup_layers(model)
    if replicas.size == 1 or not layers:
        return
    contents = replicas.broadcast_object(list(map(vocabulary_of, layers)), 0, "hvdext.placement.vocabularies")
    for layer, content in zip(layers, contents, strict=True):
        set_vocabulary_of(layer, content)


def gather_vocabularies(comm: Communicator, calls: Calls, is_here: Callable[[str], bool]) -> None:
    """Gives the whole model on each rank what layers have learnt where they are. All of `comm` call it.

    Args:
        comm: the pipeline's ranks.
        calls: the whole model, read.
        is_here: whether the layer at a path is on this rank.
    """
    holders = _holders(calls)
    if not holders:
        return
    mine = {key: vocabulary_of(layer) for key, layer in holders.items() if is_here(key[1])}
    for theirs in comm.allgather_object(mine, "hvdext.placement.vocabularies"):
        for key, content in theirs.items():
            set_vocabulary_of(holders[key], content)


def _holders(calls: Calls) -> dict[tuple[str, str], keras.Layer]:
    """The layers that may hold vocabularies, by their own path and that of the placed layer they are in."""
    found = {}
    for path, layer in {call.path: call.operation for call in calls.calls}.items():
        for number, one in enumerate(lookup_layers(layer) if isinstance(layer, keras.Layer) else ()):
            own = path if one is layer else f"{path}/{one.name}"
            found[own if number == 0 else f"{own} ({number})", path] = one
    return found
