"""What layers derive from their variables and compute with, such as the mean and variance of `Normalization`.

Keras derives it when a layer is built, adapted or read from a file, not when a variable is assigned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.keras_tools.models import flat_layers, retrace


def derive_anew(layers: Iterable[keras.Layer]) -> bool:
    """Lets layers, and those in them, derive anew what they compute with, after variables were assigned.

    Layers without variables stay as they are: what a `Discretization` has learnt is none, and would be lost.

    Returns:
        Whether anything has changed.
    """
    # Layers of Keras that have nothing to do with variables have the method, too.
    every = {id(one): one for layer in layers for one in flat_layers(layer)}.values()
    found = [one for one in every if hasattr(one, "finalize_state") and one.variables]
    before = [_tensors(one) for one in found]
    for one in found:
        one.finalize_state()
    return not all(map(_are_equal, before, map(_tensors, found)))


def settle(model: keras.Model) -> None:
    """As `derive_anew`, and where something has changed, what Keras has traced with the old is made anew."""
    if derive_anew([model]):
        retrace(model)


def derived_of(model: keras.Model) -> list[tuple[str, np.ndarray]]:
    """What layers have derived, by layer: means and variances of `Normalization`, and others of that kind."""
    layers = [layer for layer in flat_layers(model) if hasattr(layer, "finalize_state")]
    return [
        (f"{type(layer).__name__} {i}'s {name}", value)
        for i, layer in enumerate(layers)
        for name, value in sorted(_tensors(layer).items())
        if isinstance(value, np.ndarray) and value.dtype != object
    ]


def _tensors(layer) -> dict[str, Any]:
    """The eager tensors among a layer's attributes; one of a graph has no value."""
    found = {name: value for name, value in vars(layer).items() if isinstance(value, tf.Tensor)}
    return {name: value.numpy() for name, value in found.items() if hasattr(value, "numpy")}


def _are_equal(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in after)
