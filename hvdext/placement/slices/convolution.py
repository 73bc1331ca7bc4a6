"""A convolution cut by filters (its outputs) or by channels (its inputs)."""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.common.checks import require_choice
from hvdext.keras_tools.slice_marks import require_divides
from hvdext.placement.slices.layer import SlicedLayer, plain_config
from hvdext.placement.slices.operators import copy, gather, reduce, split


@keras.saving.register_keras_serializable(package="hvdext")
class SlicedConv2D(SlicedLayer, keras.layers.Conv2D):
    """`keras.layers.Conv2D` of which each rank has some filters, or some input channels.

    By filters it is to channels what `ColumnDense` is to units: gathered, or left in parts for a convolution
    cut by channels. By channels it is what `RowDense` is to inputs: partial results are summed. Strides,
    padding and dilation are those of Keras.

    Args:
        filters: of all ranks together; cut by filters, a multiple of the number of slices.
        *args: as for `keras.layers.Conv2D`.
        cut: "filters" or "channels".
        gather: by filters: give all of them to every rank; False: leave each rank its own. Until a
            `sliced_input` only what treats each channel by itself may stand in between.
        sliced_input: by channels: the inputs are this rank's channels.
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.Conv2D`, with `groups=1`; see `SlicedLayer`.

    Raises:
        ValueError: if the slices do not divide filters or channels, or an argument breaks its rule.
    """

    def __init__(
        self,
        filters,
        *args,
        cut: str = "filters",
        gather: bool = True,
        sliced_input: bool = False,
        grid=None,
        **kwargs,
    ):
        require_choice("cut", cut, ("filters", "channels"))
        super().__init__(filters, *args, grid=grid, **kwargs)
        self.cut = cut
        self.gather = gather
        self.sliced_input = sliced_input
        if self.groups != 1:
            raise ValueError(
                "`groups` must be 1 in a SlicedConv2D. "
                f"Received: groups={self.groups} in layer {self.name!r}."
            )
        if sliced_input and cut == "filters":
            raise ValueError("`sliced_input` must be False where cut='filters'. Received: sliced_input=True.")
        if cut == "filters":
            require_divides(self.comm.size, self.name, "filters", filters)
            if not gather:
                self.require_leaves_parts()
        elif not gather:
            raise ValueError("`gather` must be True where cut='channels'. Received: gather=False.")

    @property
    def _channels(self):
        return -1 if self.data_format == "channels_last" else 1

    def cut_axes(self):
        """As in `SlicedLayer`."""
        return {"kernel": 3, "bias": 0} if self.cut == "filters" else {"kernel": 2}

    def build(self, input_shape):
        """As in Keras."""
        whole = list(input_shape)
        if self.sliced_input:
            whole[self._channels] *= self.comm.size
        if self.cut == "channels":
            require_divides(self.comm.size, self.name, "channels", whole[self._channels])
        super().build(tuple(whole))
        self.input_spec = keras.layers.InputSpec(
            min_ndim=4, axes={self._channels: input_shape[self._channels]}
        )

    def call(self, inputs):
        """As in Keras."""
        x = keras.ops.convert_to_tensor(inputs)
        if self.cut == "filters":
            (x,) = copy(self.comm, [x], self.exchange_name)
            outputs = self._with_bias(self.convolution_op(x, self.kernel))
            if self.gather:
                outputs = gather(self.comm, outputs, self._channels, self.exchange_name)
        else:
            if not self.sliced_input:
                x = split(self.comm, x, self._channels, self.exchange_name)
            partial = self.convolution_op(x, self.kernel)
            outputs = self._with_bias(reduce(self.comm, partial, self.exchange_name))
        return outputs if self.activation is None else self.activation(outputs)

    def _with_bias(self, outputs):
        if self.bias is None:
            return outputs
        bias = tf.convert_to_tensor(self.bias)
        return outputs + (bias if self._channels == -1 else bias[:, tf.newaxis, tf.newaxis])

    def compute_output_shape(self, input_shape):
        """As in Keras; this rank's filters where they are not gathered."""
        shape = list(super().compute_output_shape(input_shape))
        if not self.gather:
            shape[self._channels] //= self.comm.size
        return tuple(shape)

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.Conv2D.from_config(plain_config(self, "cut", "gather", "sliced_input"))

    def get_config(self):
        """As in Keras; the grid is not part of it."""
        ours = {"cut": self.cut, "gather": self.gather, "sliced_input": self.sliced_input}
        return super().get_config() | ours
