"""An embedding table cut by rows (entries) or columns (features)."""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.common.checks import require_choice
from hvdext.keras_tools.slice_marks import Slice, require_divides
from hvdext.placement.slices.layer import SlicedLayer, plain_config
from hvdext.placement.slices.operators import gather, reduce
from hvdext.placement.slices.sample_check import note


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedEmbedding(SlicedLayer, keras.layers.Embedding):
    """`keras.layers.Embedding` of whose table each rank has a part. Every rank gets the same indices.

    By rows, each rank looks up the entries that it has, has zeros for the others, and the ranks' results are
    added up (one all-reduce forward, nothing backward). By columns, each rank looks up some of the features
    of all entries, and these are gathered (one all-gather forward, nothing backward), which sends half as
    much.

    Args:
        input_dim: entries of the whole table; by rows a multiple of the number of slices.
        output_dim: features of an entry; by columns a multiple of the number of slices.
        *args: as for `keras.layers.Embedding`.
        cut: "rows" or "columns".
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.Embedding`; see `SlicedLayer`.

    Raises:
        ValueError: if the slices do not divide the table, or an argument breaks its rule.
    """

    def __init__(self, input_dim, output_dim, *args, cut: str = "rows", grid=None, **kwargs):
        require_choice("cut", cut, ("rows", "columns"))
        if kwargs.get("weights") is not None:
            raise ValueError("`weights` must be None in a SlicedEmbedding. Received: weights.")
        super().__init__(input_dim, output_dim, *args, grid=grid, **kwargs)
        self.cut = cut
        name, length = ("input_dim", input_dim) if cut == "rows" else ("output_dim", output_dim)
        require_divides(self.comm.size, self.name, name, length)

    def cut_axes(self):
        """As in `SlicedLayer`."""
        return {"embeddings": 0 if self.cut == "rows" else 1}

    def call(self, inputs):
        """As in Keras."""
        if self.comm.size > 1:
            note(self.exchange_name, inputs)
        if self.cut == "rows":
            return reduce(self.comm, self._looked_up(inputs), self.exchange_name)
        return gather(self.comm, super().call(inputs), -1, self.exchange_name)

    def _looked_up(self, inputs):
        """The entries that this rank has, zeros for the others."""
        indices = tf.cast(inputs, tf.int32)
        part = Slice(0, self.comm.rank, self.comm.size)
        rows = part.shape((self.input_dim,))[0]
        local = indices - part.index * rows
        own = (local >= 0) & (local < rows)
        # What no rank has must fail as it does in the uncut layer.
        exists = (indices >= 0) & (indices < self.input_dim)
        found = tf.gather(
            tf.convert_to_tensor(self.embeddings), tf.where(own, local, tf.where(exists, 0, rows))
        )
        return tf.cast(tf.where(own[..., tf.newaxis], found, 0), self.compute_dtype)

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.Embedding.from_config(plain_config(self, "cut"))

    def get_config(self):
        """As in Keras; the grid is not part of it."""
        return super().get_config() | {"cut": self.cut}
