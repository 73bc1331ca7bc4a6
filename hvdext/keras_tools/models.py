"""A model's layers, variables and tensors, and the functions that Keras makes of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from hvdext.keras_tools.selection import path_of

_OPTIMIZERS = (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer)
KINDS = ("train", "test", "predict")  # of functions that Keras makes of a model's steps, and keeps


def flat_layers(layer: keras.Layer, *, include_self: bool = True) -> list[keras.Layer]:
    """A model or layer and all layers in it, at whatever depth, each once.

    Args:
        layer: the model or layer.
        include_self: whether it is one of them.
    """
    return layer._flatten_layers(include_self=include_self)


def added_losses(model: keras.Model) -> list[Any]:
    """The losses that layers have added in their calls, without penalties of weights."""
    return [loss for layer in flat_layers(model) for loss in layer._get_own_losses()]


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The optimizer that a model is compiled with, and those in its attributes, also in lists and dicts.

    Those of models in it count as well, such as a generator that is compiled and trained on its own.
    """
    parts = [
        model,
        *(part for part in flat_layers(model, include_self=False) if isinstance(part, keras.Model)),
    ]
    found = [one for part in parts for value in vars(part).values() for one in _optimizers_in(value)]
    return list({id(optimizer): optimizer for optimizer in found}.values())


def _optimizers_in(value):
    if isinstance(value, _OPTIMIZERS):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _optimizers_in(part)


def model_variables(model, optimizers: Sequence | None = None) -> list:
    """What must be alike on all ranks before training: weights, statistics and optimizer state.

    The states of random generators stay out: ranks must draw different dropout masks.

    Args:
        model: the model.
        optimizers: what it trains with; None: its own, see `optimizers_of`.
    """
    optimizers = optimizers_of(model) if optimizers is None else optimizers
    variables = [*model.variables, *(v for one in optimizers for v in one.variables)]
    unique = {id(variable): variable for variable in variables}
    return [v for v in unique.values() if not path_of(v).endswith("seed_generator_state")]


def is_built(model) -> bool:
    """True if `model` and all its layers have their variables.

    A model without a `call` of its own, whose `train_step` calls its parts, has those of its parts.
    """
    return (model.built or not has_call(model)) and not unbuilt_layers(model)


def has_call(model: keras.Model) -> bool:
    """Whether a model can be called: some, such as GANs, only have a `train_step`."""
    return type(model).call is not keras.Model.call


def unbuilt_layers(model: keras.Model) -> list[str]:
    """The names of the layers in a model that have no variables yet."""
    return [layer.name for layer in flat_layers(model, include_self=False) if not layer.built]


def input_structure(function: keras.Function) -> Any:
    """The nested structure of tensors that a functional model takes, with its symbolic tensors in it."""
    return function._inputs_struct


def output_structure(function: keras.Function) -> Any:
    """The nested structure of tensors that a functional model gives, with its symbolic tensors in it."""
    return function._outputs_struct


def maker_of(tensor: keras.KerasTensor) -> keras.Operation:
    """The layer or operation that has made a symbolic tensor."""
    return tensor._keras_history.operation


def dtype_of(tensor: keras.KerasTensor) -> str:
    """A symbolic tensor's dtype; Keras takes the words that an inverted `StringLookup` gives for numbers."""
    history = getattr(tensor, "_keras_history", None)
    maker = None if history is None else history.operation
    is_word = isinstance(maker, keras.layers.StringLookup) and maker.invert
    return "string" if is_word else tensor.dtype


def retrace(model: keras.Model, *kinds: str) -> None:
    """Makes anew what Keras has made of a model's steps, so that these are traced again when they run next.

    Replaced, not dropped: `fit` may be under way. What Keras has not made yet it makes when it needs it.

    Args:
        model: the model.
        *kinds: of `KINDS`; none: all.
    """
    for kind in kinds or KINDS:
        if getattr(model, f"{kind}_function") is not None:
            getattr(model, f"make_{kind}_function")(force=True)
