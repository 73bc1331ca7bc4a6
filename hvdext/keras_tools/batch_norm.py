"""Batch normalization: whose batch it looks at, and how a subclass may compute statistics in its own way."""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.keras_tools.models import flat_layers


def own_statistics(model: keras.Model) -> list[str]:
    """The names of layers in `model` whose training steps normalize by the batch of their own process."""
    return [
        layer.name
        for layer in flat_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and not getattr(layer, "exchanges_forward", False)
    ]


class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' layer, with the batch's statistics in a method to override."""

    def moments(
        self, inputs: tf.Tensor, mask: tf.Tensor | None, axes: list[int]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean and variance that a training step normalizes with, shape (channels,).

        Args:
            inputs: the layer's.
            mask: None, or the shape of `inputs` without its last axis: which values count.
            axes: all axes but that of the channels.
        """
        del axes  # Keras knows them
        return super()._moments(inputs, mask)

    def _moments(self, inputs, mask):
        return self.moments(inputs, mask, self._reduction_axes)
