"""A model's variables, and whether it has them."""

from __future__ import annotations

from hvdext.keras_tools.selection import path_of


def model_variables(model, optimizer=None) -> list:
    """What must be alike on all ranks before training: weights, statistics and optimizer state.

    The states of random generators stay out: ranks must draw different dropout masks.

    Args:
        model: the model.
        optimizer: what it trains with; None: what it is compiled with.
    """
    optimizer = optimizer if optimizer is not None else getattr(model, "optimizer", None)
    variables = [*model.variables, *(optimizer.variables if optimizer is not None else [])]
    unique = {id(variable): variable for variable in variables}
    return [v for v in unique.values() if not path_of(v).endswith("seed_generator_state")]


def is_built(model) -> bool:
    """True if `model` and all its layers have their variables."""
    return model.built and all(layer.built for layer in model._flatten_layers())
