"""What a model trains with besides its variables, to be compared among ranks by its `repr`."""

from __future__ import annotations

import functools
import types
from typing import Any

import keras
import tensorflow as tf

from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.numbering import renumbered

_PLAIN = (str, int, float, bool, type(None))
# Those that only change how the same numbers are worked out, and what has a comparison of its own.
_APART = ("optimizer", "run_eagerly", "jit_compile", "steps_per_execution", "metrics", "weighted_metrics")


def loss_facts(model: keras.Model) -> dict[str, Any]:
    """What `compile` was given that decides the loss: numbers and words, also in attributes of objects."""
    config = getattr(getattr(model, "_compile_config", None), "config", {})
    return {f"compile({key}=...)": _plain(value) for key, value in config.items() if key not in _APART}


def frozen_layers(model: keras.Model) -> list[str]:
    """The names of the layers that are not trained, numbered from 0."""
    layers = flat_layers(model, include_self=False)
    names = renumbered([layer.name for layer in layers])
    return [name for name, layer in zip(names, layers, strict=True) if not layer.trainable]


def _plain(value, depth=0):
    """Numbers and words in a structure; of other objects their class, and what they keep of such."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(part, depth) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, depth) for part in value]
    if isinstance(value, (keras.Variable, tf.Variable)):
        is_number = len(value.shape) == 0 and tf.as_dtype(value.dtype).is_floating
        return float(value.numpy()) if is_number else "a variable"
    if isinstance(value, (keras.Layer, keras.optimizers.Optimizer)) or depth > 2:
        return type(value).__name__
    kept = {key: part for key, part in _kept(value).items() if key not in ("name", "_name")}
    return [getattr(value, "__qualname__", type(value).__name__), _plain(kept, depth + 1)]


def _kept(value):
    """What an object has for attributes, or a function of the one that has made it.

    A function's own attributes say nothing of what it computes: Keras notes addresses in them.
    """
    if isinstance(value, functools.partial):
        return {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    if isinstance(value, types.FunctionType):
        return dict(zip(value.__code__.co_freevars, map(_content, value.__closure__ or ()), strict=True))
    found = getattr(value, "__dict__", {})
    kinds = (*_PLAIN, dict, list, tuple, keras.Variable, tf.Variable)
    return {key: part for key, part in found.items() if isinstance(part, kinds)}


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None
