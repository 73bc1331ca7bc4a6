"""A model as plain Keras has it: clones of layers, cut ones uncut, compiled as another model is.

What is compiled is not made again of its configuration: Keras finds classes and functions by their names only
if they are its own, or registered. It saves them all the same.
"""

from __future__ import annotations

from typing import Any

import keras

from hvdext.keras_tools.functional import clone
from hvdext.keras_tools.layers import cloned
from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.training import compiled_with


def is_cut(model: keras.Model) -> bool:
    """Whether the model has layers that `uncut_layer` replaces."""
    return any(hasattr(layer, "uncut") for layer in flat_layers(model, include_self=False))


def uncut_layer(layer: Any) -> Any:
    """As `cloned`; of a cut layer, the layer of plain Keras."""
    return layer.uncut() if hasattr(layer, "uncut") else cloned(layer)


def uncut_clone(model: keras.Model) -> keras.Model:
    """The model of plain Keras that `model` is a cut of, not compiled, with weights of its own."""
    return clone(model, uncut_layer, recursive=True)


def compile_alike(
    model: keras.Model, source: keras.Model, optimizer: keras.optimizers.Optimizer | None, **changed: Any
) -> None:
    """Compiles `model` so that Keras saves of it what it would save of the compiled `source`.

    Args:
        model: gets `source`'s very losses and metrics; where those are of cut logits, Keras' own.
        source: compiled.
        optimizer: of `model`, whose state is saved: `fresh_copy` that of `source`, or None for no state.
        **changed: arguments of `compile` that are to differ.
    """
    given = compiled_with(source) | changed
    uncut = {key: _uncut(value) for key, value in given.items() if key != "optimizer"}
    model.compile(optimizer, auto_scale_loss=False, **uncut)
    compiled_with(model)["optimizer"] = given["optimizer"]


def _uncut(structure):
    return keras.tree.map_structure(
        lambda one: one.uncut() if hasattr(one, "uncut") else one, structure, none_is_leaf=False
    )
