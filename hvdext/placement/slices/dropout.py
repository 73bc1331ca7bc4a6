"""Dropout on what is cut: each rank uses its part of the mask that the uncut layer would draw."""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.keras_tools.slice_marks import Slice
from hvdext.placement.slices.layer import SlicedLayer, plain_config


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedDropout(SlicedLayer, keras.layers.Dropout):
    """`keras.layers.Dropout` for this rank's part of a tensor.

    A plain `Dropout` would give every part the same mask. Here all ranks draw the mask of the whole from the
    same seed, at the price of its memory for a moment, and each takes its part; so dropped is what the uncut
    layer drops. The seed must be the same on all ranks, as `slice_layers` and a common
    `keras.utils.set_random_seed` see to. Where a tensor is whole on every rank, use `keras.layers.Dropout`.

    Args:
        rate: share of the values that are dropped, in [0, 1].
        *args: as for `keras.layers.Dropout`.
        axis: along which the inputs are cut.
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.Dropout`.
    """

    def __init__(self, rate, *args, axis: int = -1, grid=None, **kwargs):
        super().__init__(rate, *args, grid=grid, **kwargs)
        self.axis = axis

    def cut_axes(self):
        """As in `SlicedLayer`."""
        return {}

    def call(self, inputs, training=False):
        """As in Keras."""
        if self.comm.size == 1 or not training or self.rate == 0:
            return super().call(inputs, training=training)
        part = Slice(self.axis % inputs.shape.rank, self.comm.rank, self.comm.size)
        sizes = tf.unstack(tf.shape(inputs))
        sizes[part.axis] = inputs.shape[part.axis] * part.count
        ones = tf.ones(sizes, inputs.dtype)
        ones.set_shape([n if i != part.axis else sizes[i] for i, n in enumerate(inputs.shape)])
        kept = keras.random.dropout(ones, self.rate, self.noise_shape, seed=self.seed_generator)
        kept = part.of(kept)
        # Not a product alone: 0 times infinity is no zero.
        return tf.where(kept > 0, inputs * kept, 0)

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.Dropout.from_config(plain_config(self, "axis"))

    def get_config(self):
        """As in Keras; the grid is not part of it."""
        return super().get_config() | {"axis": self.axis}
