"""Layers made again, what they are called with, and the masks that tensors carry."""

from __future__ import annotations

from typing import Any

import keras
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask

from hvdext.keras_tools.replacing import replace
from hvdext.keras_tools.vocabularies import lookup_layers, take_along


def cloned(layer: Any) -> Any:
    """A layer or operation with the same settings and vocabularies, without weights."""
    if isinstance(layer, keras.layers.Lambda):  # whose function Keras would have to serialize
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
    made = type(layer).from_config(layer.get_config())
    if isinstance(layer, keras.Layer) and lookup_layers(layer):
        if len(lookup_layers(made)) < len(lookup_layers(layer)):  # some are made in `build`
            made.build_from_config(layer.get_build_config())
        take_along(layer, made)
    return made


def leave_arguments_alone(layer: keras.Layer) -> None:
    """Has Keras call a layer on its arguments as they are: neither cast, nor converted, nor refused."""
    replace(layer, _convert_input_args=False, _allow_non_tensor_positional_args=True)


def mask_of(tensor: Any) -> Any:
    """The mask that a tensor carries, symbolic or not; None if it has none."""
    return get_keras_mask(tensor)


def set_mask(tensor: Any, mask: Any) -> None:
    """Has a tensor carry a mask.

    Args:
        tensor: symbolic or not.
        mask: None: no mask.
    """
    set_keras_mask(tensor, mask)
