"""What preprocessing layers have learnt on one rank becomes everybody's: vocabularies, bins, other assets."""

from __future__ import annotations

import hashlib

import keras

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.keras_tools.models import retrace
from hvdext.keras_tools.vocabularies import lookup_layers, set_vocabulary_of, vocabulary_of

_SHOWN = 4  # entries


def broadcast_vocabularies(comm: Communicator, model: keras.Layer, root: int) -> None:
    """Gives the layers of `model` on every rank what those of one rank hold; every rank must call it.

    Args:
        comm: among which ranks.
        model: a model; what Keras has traced with another vocabulary is made anew.
        root: whose vocabularies count, by its place in `comm`.

    Raises:
        ValueError: on every rank alike, if the models have different layers of that kind or a layer cannot
            hold what the root's does.
    """
    layers = lookup_layers(model)
    kinds = [type(layer).__name__ for layer in layers]
    if comm.size == 1:
        return
    agreement.check(comm, "layers with vocabularies", {"layers": kinds})
    if not layers:
        return
    mine = [vocabulary_of(layer) for layer in layers] if comm.rank == root else None
    contents = comm.broadcast_object(mine, root, "hvdext.broadcast.vocabularies")
    problem, has_changed = None, False
    try:
        for layer, content in zip(layers, contents, strict=True):
            has_changed |= set_vocabulary_of(layer, content)
    except ValueError as error:  # told to the other ranks first
        problem = str(error)
    agreement.check(comm, "vocabularies that were broadcast", {"problem": problem}, problem)
    if has_changed and isinstance(model, keras.Model):
        retrace(model)


def vocabulary_facts(model: keras.Layer) -> dict[str, str]:
    """The vocabularies in a model, to be compared among ranks."""
    return {
        f"vocabulary {i} ({type(layer).__name__})": _shown(vocabulary_of(layer))
        for i, layer in enumerate(lookup_layers(model))
    }


def _shown(content):
    if content is None:
        return "none"
    first = ", ".join(map(_short, content.entries[:_SHOWN]))
    digest = hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    return f"{len(content.entries)} entries, beginning with {first} (digest {digest})"


def _short(entry):
    return repr(entry[0] if isinstance(entry, tuple) else entry)[:40]
