"""Optimizers and losses of the user's own made again, under the names that files give them."""

from __future__ import annotations

from typing import Any

import keras

from hvdext.keras_tools.optimizers import learning_rate_of, with_members
from hvdext.keras_tools.training import compiled_with


def fresh_copy(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """An optimizer with the settings of `optimizer`, not built."""
    with keras.saving.custom_object_scope(_own_classes([optimizer])):
        return type(optimizer).from_config(optimizer.get_config())


def custom_objects_of(model: keras.Model) -> Any:
    """A context in which Keras finds by name what `model` is compiled with."""
    given = compiled_with(model) if model.compiled else {}
    parts = [part for part in keras.tree.flatten(given) if not isinstance(part, (str, int, float))]
    functions = {part.__name__: part for part in parts if hasattr(part, "__name__")}
    return keras.saving.custom_object_scope(_own_classes(parts) | functions)


def _own_classes(parts):
    """The classes of objects, and of what optimizers among them are made of, by the names in files."""
    optimizers = [part for part in parts if isinstance(part, keras.optimizers.Optimizer)]
    members = [member for optimizer in optimizers for member in with_members(optimizer)]
    rates = [learning_rate_of(member) for member in members]
    kinds = [type(part) for part in [*parts, *members, *rates]]
    return {kind.__name__: kind for kind in kinds if not kind.__module__.startswith(("keras.", "builtins"))}
