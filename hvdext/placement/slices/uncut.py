"""A model as plain Keras has it: clones of layers, cut ones uncut, compiled as another model is.

What is compiled is not made again of its configuration: Keras finds classes and functions by their names only
if they are its own, or registered. It saves them all the same.
"""

from __future__ import annotations

from typing import Any

import keras

from hvdext.placement.slices.layer import SlicedLayer


def is_cut(model: keras.Model) -> bool:
    """Whether the model has layers that `uncut_layer` replaces."""
    return any(isinstance(layer, SlicedLayer) for layer in model._flatten_layers(include_self=False))


def cloned(layer: Any) -> Any:
    """A layer or operation with the same settings, without weights."""
    if isinstance(layer, keras.layers.Lambda):  # whose function Keras would have to serialize
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    return layer.__class__.from_config(layer.get_config())


def uncut_layer(layer: Any) -> Any:
    """As `cloned`; of a cut layer, the layer of plain Keras."""
    return layer.uncut() if isinstance(layer, SlicedLayer) else cloned(layer)


def uncut_clone(model: keras.Model) -> keras.Model:
    """The model of plain Keras that `model` is a cut of, not compiled, with weights of its own."""
    was_compiled, model.compiled = model.compiled, False  # Keras would compile the clone as well
    try:
        return keras.models.clone_model(model, clone_function=uncut_layer, recursive=True)
    finally:
        model.compiled = was_compiled


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
    given = source._compile_config.config | changed
    uncut = {key: _uncut(value) for key, value in given.items() if key != "optimizer"}
    model.compile(optimizer, auto_scale_loss=False, **uncut)
    model._compile_config.config["optimizer"] = given["optimizer"]


def _uncut(structure):
    return keras.tree.map_structure(
        lambda one: one.uncut() if hasattr(one, "uncut") else one, structure, none_is_leaf=False
    )
