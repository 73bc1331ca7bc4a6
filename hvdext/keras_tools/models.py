"""A model's variables, and whether it has them."""

from __future__ import annotations

import keras

from hvdext.keras_tools.selection import path_of


def flatten_layers(model: keras.Layer, *, include_self: bool = True) -> list[keras.Layer]:
    """A model or layer and all layers in it, at whatever depth, each once.

    Args:
        model: the model or layer.
        include_self: whether it is one of them.
    """
    return model._flatten_layers(include_self=include_self)


def model_variables(model) -> list:
    """What must be alike on all ranks before training: weights, statistics and optimizer state.

    The states of random generators stay out: ranks must draw different dropout masks.
    """
    optimizer = getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer is not None else [])]
    unique = {id(variable): variable for variable in variables}
    return [v for v in unique.values() if not path_of(v).endswith("seed_generator_state")]


def is_built(model) -> bool:
    """True if `model` and all its layers have their variables."""
    return model.built and all(layer.built for layer in flatten_layers(model))
