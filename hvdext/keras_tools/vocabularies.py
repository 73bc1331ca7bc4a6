"""What preprocessing layers have learnt or been given that is no variable: vocabularies, bins, other assets.

Keras keeps it in lookup tables and lists, which neither `get_config` nor `get_weights` tells in full: a layer
made again of its configuration has none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.keras_tools.models import flat_layers

_TABLES = (keras.layers.StringLookup, keras.layers.IntegerLookup)
_WITH_TABLE = (keras.layers.TextVectorization, *_TABLES)


@dataclass(frozen=True)
class Vocabulary:
    """What one layer has learnt; equal ones compute the same. It pickles.

    Attributes:
        entries: tokens (bytes or integers) in the order of their indices, without those for masks and unknown
            tokens; boundaries of bins; or pairs (name, bytes) of a layer's own files.
        weights: those of "tf_idf", of all indices; None otherwise.
    """

    entries: tuple
    weights: tuple[float, ...] | None = None


def lookup_layers(model: keras.Layer) -> list[keras.Layer]:
    """The layers in a model or layer, itself among them, that may hold a `Vocabulary`.

    Those are `TextVectorization`, `StringLookup`, `IntegerLookup`, `Discretization`, and what else saves
    assets, at whatever depth; in the same order in models that are built alike.
    """
    found = [layer for layer in flat_layers(model) if _may_learn(layer)]
    # A TextVectorization has a StringLookup inside, of which it speaks itself.
    inner = {id(_table_of(layer)) for layer in found if isinstance(layer, keras.layers.TextVectorization)}
    return [layer for layer in found if id(layer) not in inner]


def vocabulary_of(layer: keras.Layer) -> Vocabulary | None:
    """What one of `lookup_layers` has learnt or been given; None if nothing."""
    if isinstance(layer, _WITH_TABLE):
        return _in_table(_table_of(layer))
    if isinstance(layer, keras.layers.Discretization):
        bins = layer.bin_boundaries
        return None if bins is None else Vocabulary(tuple(map(float, bins)))
    return _in_files(layer)


def set_vocabulary_of(layer: keras.Layer, content: Vocabulary | None) -> bool:
    """Gives a layer what `vocabulary_of` has found in one of the same kind and settings.

    What Keras has traced with the old one goes on with it: see `models.retrace`.

    Args:
        layer: one of `lookup_layers`.
        content: what it is to hold.

    Returns:
        Whether anything has changed.

    Raises:
        ValueError: if the layer cannot hold it: there is nothing to hold, or its outputs have a width that
            another vocabulary has given them.
    """
    if vocabulary_of(layer) == content:
        return False
    try:
        if content is None:
            raise ValueError("it has one, and is to be like a layer that was never adapted")
        if isinstance(layer, _WITH_TABLE):
            _fill_table(layer, content)
        elif isinstance(layer, keras.layers.Discretization):
            layer.bin_boundaries = list(content.entries)
        else:
            _read_files(layer, content)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The vocabulary of {type(layer).__name__} {layer.name!r} cannot be replaced: {error}"
        ) from error
    return True


def take_along(source: keras.Layer, target: keras.Layer) -> bool:
    """Gives the layers in `target` the vocabularies of those in `source`.

    Args:
        source: a layer or model.
        target: one like it, such as a clone.

    Returns:
        Whether anything has changed.

    Raises:
        ValueError: if they do not have the same layers, or one of them cannot hold what the other holds.
    """
    theirs, ours = lookup_layers(source), lookup_layers(target)
    if [type(layer) for layer in theirs] != [type(layer) for layer in ours]:
        raise ValueError(
            "Vocabularies must find the layers that they belong to: those of "
            f"{source.name!r} are in {_named(theirs)}. Received: a copy with {_named(ours)}."
        )
    changed = [set_vocabulary_of(own, vocabulary_of(one)) for own, one in zip(ours, theirs, strict=True)]
    return any(changed)


def _may_learn(layer) -> bool:
    return isinstance(layer, keras.layers.Discretization) or hasattr(layer, "save_assets")


def _named(layers: Iterable) -> str:
    return ", ".join(f"{type(layer).__name__} {layer.name!r}" for layer in layers) or "none"


# -- tables ------------------------------------------------------------------------------------------------


def _table_of(layer) -> Any:
    return layer._lookup_layer if isinstance(layer, keras.layers.TextVectorization) else layer


def _in_table(lookup) -> Vocabulary | None:
    table = lookup.lookup_table
    if int(table.size()) == 0:  # also where it has never been filled
        return None
    tokens, indices = reversed(table.export()) if lookup.invert else table.export()
    order = np.argsort(indices.numpy())
    entries = tuple(tokens.numpy()[order].tolist())
    weights = None
    if lookup.output_mode == "tf_idf":
        weights = tuple(lookup.idf_weights.numpy().tolist())
    return Vocabulary(entries, weights)


def _fill_table(layer, content: Vocabulary) -> None:
    lookup = _table_of(layer)
    is_text = isinstance(lookup, keras.layers.StringLookup)
    tokens = np.array(content.entries, object if is_text else np.int64)
    if content.weights is None:
        lookup.set_vocabulary(tokens)
    else:
        lookup.set_vocabulary(tokens, np.zeros(len(tokens)))
        # Keras would make up those of what is no token.
        lookup.idf_weights = tf.Variable(np.array(content.weights, keras.config.floatx()), trainable=False)
        lookup.idf_weights_const = lookup.idf_weights.value()
    # A vocabulary that the layer was made with is in its configuration, and Keras would save that one.
    lookup.input_vocabulary = lookup.input_idf_weights = None


# -- files -------------------------------------------------------------------------------------------------


def _in_files(layer) -> Vocabulary | None:
    with tempfile.TemporaryDirectory() as folder:
        layer.save_assets(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        entries = tuple((str(path.relative_to(folder)), path.read_bytes()) for path in files)
    return Vocabulary(entries) if entries else None


def _read_files(layer, content: Vocabulary) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in content.entries:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        layer.load_assets(folder)
