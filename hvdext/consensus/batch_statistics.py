"""Batch normalization after averaging: its statistics belong to weights that are no longer there.

The mean of the ranks' statistics is not the statistics of the mean of their weights. Izmailov et al. 2018
("Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407), section 3.2, run
over the data once more with the averaged weights; a few batches do.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable

import keras
import tensorflow as tf

from hvdext.keras_tools.models import flat_layers


def layers_of(model) -> list[keras.layers.BatchNormalization]:
    """All batch normalization layers of `model`, also within nested models."""
    return [la for la in flat_layers(model) if isinstance(la, keras.layers.BatchNormalization)]


def first_inputs(data: Iterable, count: int) -> list:
    """The inputs of the first `count` batches of `data`.

    Raises:
        ValueError: if there are fewer.
    """
    if isinstance(data, keras.utils.PyDataset):
        data = (data[i] for i in range(min(count, len(data))))
    inputs = [keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in itertools.islice(data, count)]
    if len(inputs) < count:
        raise ValueError(
            f"`reestimate_batch_norm` must hold {count} batches. Received: data with {len(inputs)}."
        )
    return inputs


def reestimate(model, inputs: list) -> None:
    """Replaces the moving statistics by the plain mean of the batches' moments.

        for batch i = 1, 2, ...:  statistic <- statistic * (i - 1) / i + moment(batch i) / i

    Layers with `trainable=False` keep theirs, as in training. Other variables that a forward pass
    changes, except the states of random generators, are put back.

    Args:
        model: built; its batch normalization layers are changed.
        inputs: what the model is called on, batch by batch, with `training=True`.
    """
    layers = layers_of(model)
    statistics = {id(v) for layer in layers for v in layer.non_trainable_variables}
    others = [v for v in model.non_trainable_weights if id(v) not in statistics]
    kept = [tf.identity(v) for v in others]
    momenta = [layer.momentum for layer in layers]
    options = {"training": True} if "training" in inspect.signature(model.call).parameters else {}
    try:
        for number, batch in enumerate(inputs, 1):
            for layer in layers:
                layer.momentum = (number - 1) / number
            model(batch, **options)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in zip(others, kept, strict=True):
            variable.assign(value)
