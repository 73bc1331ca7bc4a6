"""Dense layers cut by columns (outputs) and by rows (inputs).

    column:  Y_r = X W_r + b_r        each rank has some of the units; gathered, or left in parts
    row:     Y   = sum_r X_r W_r + b  each rank has some of the inputs; the sums of the ranks are added up

A column layer that leaves its parts and a row layer that takes them exchange once forward, in the row
layer, and once backward, in the column layer (Shoeybi et al. 2019, arXiv:1909.08053, figure 3a).
"""

from __future__ import annotations

import keras

from hvdext.keras_tools.slice_marks import require_divides
from hvdext.placement.slices.layer import SlicedLayer, plain_config
from hvdext.placement.slices.operators import copy, gather, reduce, split


@keras.saving.register_keras_serializable(package="hvdext")
class ColumnDense(SlicedLayer, keras.layers.Dense):
    """`keras.layers.Dense` of which each rank has `units / slices` units.

    Every rank of the group gets the same inputs. The first weights equal the slices of those that the uncut
    layer would draw, if the ranks share a seed (`keras.utils.set_random_seed`).

    Args:
        units: of all ranks together; a multiple of the number of slices.
        *args: as for `keras.layers.Dense`.
        gather: give all units to every rank; False: leave each rank its own, for a `RowDense` with
            `sliced_input=True`. Between the two only what works element by element may stand.
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.Dense`; see `SlicedLayer`.

    Raises:
        ValueError: if the slices do not divide `units`, or the layer cannot leave parts.
    """

    def __init__(self, units, *args, gather: bool = True, grid=None, **kwargs):
        super().__init__(units, *args, grid=grid, **kwargs)
        self.gather = gather
        require_divides(self.comm.size, self.name, "units", units)
        if not gather:
            self.require_leaves_parts()

    def cut_axes(self):
        """As in `SlicedLayer`."""
        return {"kernel": 1, "bias": 0}

    def call(self, inputs, training=None):
        """As in Keras."""
        (x,) = copy(self.comm, [keras.ops.convert_to_tensor(inputs)], self.exchange_name)
        outputs = keras.ops.matmul(x, self.kernel)
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        if self.gather:
            outputs = gather(self.comm, outputs, -1, self.exchange_name)
        # After the gather: an activation may look at all units.
        return outputs if self.activation is None else self.activation(outputs)

    def compute_output_shape(self, input_shape):
        """As in Keras; this rank's units where they are not gathered."""
        *rest, units = super().compute_output_shape(input_shape)
        return (*rest, units if self.gather else units // self.comm.size)

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.Dense.from_config(plain_config(self, "gather"))

    def get_config(self):
        """As in Keras; the grid is not part of it."""
        return super().get_config() | {"gather": self.gather}


@keras.saving.register_keras_serializable(package="hvdext")
class RowDense(SlicedLayer, keras.layers.Dense):
    """`keras.layers.Dense` of which each rank has the rows of `inputs / slices` inputs; the bias is whole.

    Every rank of the group gets the same inputs, or with `sliced_input` its part of them. Activation and bias
    come after the sum over the ranks. The first weights are as in `ColumnDense`.

    Args:
        units: all of which every rank gets.
        *args: as for `keras.layers.Dense`.
        sliced_input: the inputs are this rank's part, as a `ColumnDense` with `gather=False` leaves them.
        grid: as in `SlicedLayer`.
        **kwargs: as for `keras.layers.Dense`; see `SlicedLayer`.

    Raises:
        ValueError: when it is built, if the slices do not divide the inputs.
    """

    def __init__(self, units, *args, sliced_input: bool = False, grid=None, **kwargs):
        super().__init__(units, *args, grid=grid, **kwargs)
        self.sliced_input = sliced_input

    def cut_axes(self):
        """As in `SlicedLayer`."""
        return {"kernel": 0}

    def build(self, input_shape):
        """As in Keras."""
        *rest, width = input_shape
        inputs = width * self.comm.size if self.sliced_input else width
        require_divides(self.comm.size, self.name, "inputs", inputs)
        super().build((*rest, inputs))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})

    def call(self, inputs, training=None):
        """As in Keras."""
        x = keras.ops.convert_to_tensor(inputs)
        if not self.sliced_input:
            x = split(self.comm, x, -1, self.exchange_name)
        outputs = reduce(self.comm, keras.ops.matmul(x, self.kernel), self.exchange_name)
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def uncut(self):
        """As in `SlicedLayer`."""
        return keras.layers.Dense.from_config(plain_config(self, "sliced_input"))

    def get_config(self):
        """As in Keras; the grid is not part of it."""
        return super().get_config() | {"sliced_input": self.sliced_input}
