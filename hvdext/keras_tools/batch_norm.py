"""Batch normalization whose statistics a subclass may compute in its own way."""

from __future__ import annotations

import keras
import tensorflow as tf


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
