"""`SlicedLayer`: what all cut layers share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.grid import Grid, slices_of
from hvdext.keras_tools.slice_marks import Slice, mark, require_divides
from hvdext.placement.slices.operators import named, reduce
from hvdext.placement.slices.updates import watch_optimizers

_thread = threading.local()
_ADDITIVE = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)
_MIXING = ("softmax", "log_softmax", "sparsemax", "glu")  # activations that look at a whole axis


class SlicedLayer(keras.layers.Layer):
    """Comes before a Keras layer among the bases of a class, and cuts that layer's weights.

    The Keras layer is told the whole sizes. Each weight that `cut_axes` names is made with the shape of this
    rank's part, its initial value the part of what the initializer makes of the whole shape, so that fans and
    seeds count as in the uncut layer.

    Args:
        *args: as for the Keras layer.
        grid: the `hvd.Grid` along whose slices the layer is cut; None: that of the surrounding
            `grid.data_parallel()`, otherwise all ranks.
        **kwargs: as for the Keras layer. Weights that are cut take the regularizers L1, L2 and L1L2 and the
            constraint NonNeg.

    Raises:
        ValueError: if the layer is asked to do what only an uncut one can.
    """

    def __init__(self, *args, grid: Grid | Communicator | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.comm = slices_of(grid)
        self.supports_jit = False  # XLA cannot compile the engine's collectives
        for setting in ("lora_rank", "quantization_config", "quantization_mode"):
            if getattr(self, setting, None) is not None:
                raise ValueError(
                    f"`{setting}` must be None in a cut layer. Received: {setting}="
                    f"{getattr(self, setting)!r} in layer {self.name!r}."
                )

    def cut_axes(self) -> Mapping[str, int]:
        """The axis along which each weight is cut, by the weight's name."""
        raise NotImplementedError

    def uncut(self) -> keras.layers.Layer:
        """A layer of plain Keras with the same name and settings, without weights."""
        raise NotImplementedError

    @property
    def exchange_name(self) -> str:
        """The first part of the names of this layer's collectives."""
        return named(self.path or self.name)

    def add_weight(
        self, *args, shape=None, initializer=None, name=None, regularizer=None, constraint=None, **kwargs
    ):
        """As in Keras, for the whole; returns this rank's part of it."""
        axis = self.cut_axes().get(name)
        if axis is None or self.comm.size == 1:
            return super().add_weight(
                *args,
                shape=shape,
                initializer=initializer,
                name=name,
                regularizer=regularizer,
                constraint=constraint,
                **kwargs,
            )
        require_divides(self.comm.size, self.name, f"{name}.shape[{axis}]", shape[axis])
        self._require_additive_regularizer(name, regularizer)
        self._require_elementwise_constraint(name, constraint)
        part = Slice(axis, self.comm.rank, self.comm.size)
        variable = super().add_weight(
            shape=part.shape(shape),
            initializer=_PartOf(initializer or "glorot_uniform", shape, part),
            name=name,
            regularizer=regularizer and _Summed(regularizer, self.comm, named(f"{self.path}/{name}")),
            constraint=constraint,
            **kwargs,
        )
        mark(variable, part, self.comm)
        watch_optimizers()
        return variable

    def quantize(self, mode=None, config=None, **kwargs):
        """Refuses: what a cut layer holds is a part.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"Layer {self.name!r} is cut: quantize the uncut model.")

    def enable_lora(self, *args, **kwargs):
        """Refuses: what a cut layer holds is a part.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"Layer {self.name!r} is cut: enable LoRA in the uncut model.")

    def require_leaves_parts(self) -> None:
        """Refuses, where the output stays cut, what needs all of it.

        Raises:
            ValueError: for an activation along the axis, or an activity regularizer.
        """
        activation = getattr(self, "activation", None)
        if activation is not None and not is_elementwise(activation):
            raise ValueError(
                "`activation` must work element by element where `gather` is False. "
                f"Received: activation={activation.__name__!r} in layer {self.name!r}."
            )
        if self.activity_regularizer is not None:
            raise ValueError(
                "`activity_regularizer` must be None where `gather` is False. "
                f"Received: {type(self.activity_regularizer).__name__} in layer {self.name!r}."
            )

    def _require_additive_regularizer(self, name, regularizer):
        if regularizer is not None and type(regularizer) not in _ADDITIVE:
            raise ValueError(
                f"The regularizer of `{name}` must be L1, L2 or L1L2 in a cut layer, whose parts add up to "
                f"the whole. Received: {type(regularizer).__name__} in layer {self.name!r}."
            )

    def _require_elementwise_constraint(self, name, constraint):
        if constraint is not None and type(constraint) is not keras.constraints.NonNeg:
            raise ValueError(
                f"The constraint of `{name}` must be NonNeg in a cut layer: others look at the whole. "
                f"Received: {type(constraint).__name__} in layer {self.name!r}."
            )


def is_elementwise(activation: Any) -> bool:
    """False for the activations of Keras that look at a whole axis; a user's own are taken to be fine."""
    return getattr(activation, "__name__", None) not in _MIXING


def plain_config(layer: keras.layers.Layer, *ours: str) -> dict[str, Any]:
    """The configuration of a cut layer without our own arguments, for the Keras layer it is made of."""
    return {key: value for key, value in layer.get_config().items() if key not in ours}


@contextlib.contextmanager
def blank_parts() -> Iterator[None]:
    """Context in which parts start as zeros, in this thread: their values come from elsewhere."""
    _thread.blank = True
    try:
        yield
    finally:
        _thread.blank = False


class _PartOf(keras.initializers.Initializer):
    """This rank's part of what an initializer makes of the whole shape; the whole is dropped at once."""

    def __init__(self, initializer, whole, part):
        self._initializer = keras.initializers.get(initializer)
        self._whole = tuple(whole)
        self._part = part

    def __call__(self, shape, dtype=None, **kwargs):
        if getattr(_thread, "blank", False):
            return tf.zeros(shape, dtype)
        with tf.device("/CPU:0"):
            whole = tf.convert_to_tensor(self._initializer(self._whole, dtype=dtype))
            part = tf.identity(self._part.of(whole))
        return tf.identity(part)


class _Summed(keras.regularizers.Regularizer):
    """The penalty of the whole: the sum of the parts'."""

    def __init__(self, regularizer, comm, name):
        self._regularizer = regularizer
        self._comm = comm
        self._name = name

    def __call__(self, x):
        return reduce(self._comm, tf.convert_to_tensor(self._regularizer(x)), f"{self._name}.penalty")
