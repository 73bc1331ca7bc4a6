"""What a model takes and gives, in the protocol's words: names, datatypes, shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.keras_tools.functional import function_of, nodes_of
from hvdext.keras_tools.models import dtype_of, input_structure, maker_of, output_structure
from hvdext.serving.service import Signature, TensorSpec

DATATYPES = {
    tf.bool: "BOOL",
    tf.uint8: "UINT8",
    tf.uint16: "UINT16",
    tf.uint32: "UINT32",
    tf.uint64: "UINT64",
    tf.int8: "INT8",
    tf.int16: "INT16",
    tf.int32: "INT32",
    tf.int64: "INT64",
    tf.float16: "FP16",
    tf.float32: "FP32",
    tf.float64: "FP64",
    tf.string: "BYTES",
}
NUMPY_TYPES = {name: dtype.as_numpy_dtype for dtype, name in DATATYPES.items()}  # BYTES: object
_WORDS = 1000  # of a vocabulary are enough to try a model with
# NumPy has no bfloat16. As FP32 it travels without a loss.
_OFFERED_AS = {tf.bfloat16: tf.float32}


@dataclass(frozen=True)
class Port:
    """Where a tensor enters or leaves a model.

    Attributes:
        spec: what the outside sees.
        inner: the type within the model.
        words: of an input, values that it is made for, such as a vocabulary's; to try the model with.
        below: of an input of whole numbers, what they must be less than; None: not known.
    """

    spec: TensorSpec
    inner: tf.DType
    words: tuple[Any, ...] = ()
    below: int | None = None

    @property
    def outer(self) -> tf.DType:
        """The type that the outside sees."""
        return _OFFERED_AS.get(self.inner, self.inner)

    @property
    def has_batch(self) -> bool:
        """Whether the first axis is open, as that of a batch."""
        return bool(self.spec.shape) and self.spec.shape[0] is None


def port(name: str, dtype: Any, shape: Iterable[int | None], optional: bool = False) -> Port:
    """A port for tensors of that type.

    Raises:
        ValueError: if the protocol has no word for the type.
    """
    inner = tf.as_dtype(dtype)
    datatype = DATATYPES.get(_OFFERED_AS.get(inner, inner))
    if datatype is None:
        raise ValueError(
            f"Tensor {name!r} must be of a type that can be served: "
            f"{', '.join(t.name for t in (*DATATYPES, *_OFFERED_AS))}. Received: {inner.name}."
        )
    return Port(TensorSpec(name, datatype, tuple(shape), optional), inner)


def signature_of(takes: Sequence[Port], gives: Sequence[Port]) -> Signature:
    """The signature of a model with these ports.

    Raises:
        ValueError: if it takes nothing, or a tensor has no batch axis that is open.
    """
    if not takes:
        raise ValueError("The model must take an input. Received: none.")
    for side, ports in (("input", takes), ("output", gives)):
        for one in ports:
            if not one.has_batch:
                raise ValueError(
                    "A model that is served must take and give batches of any size: the first axis of each "
                    f"input and output must be open (None). Received: {side} {one.spec.name!r} of shape "
                    f"{one.spec.shape}."
                )
    return Signature(tuple(p.spec for p in takes), tuple(p.spec for p in gives))


def keras_ports(model: keras.Model) -> tuple[list[Port], list[Port]]:
    """What a Sequential or functional model takes and gives, in the order of its graph's tensors.

    An input is called as its key in the dict that the model takes, or else as its input layer; an output as
    its key in the dict that the model gives, or else as the layer that makes it.

    Raises:
        ValueError: if the model has no graph, or a tensor cannot be served.
    """
    function = function_of(model)
    if function is None and isinstance(model, keras.Sequential) and not model.built:
        raise ValueError(
            "A Sequential model that is served must have been built before it was saved: begin it with "
            "keras.Input(...), or call or fit it first; before that it has no weights. "
            f"Received: {model.name!r}, which is not."
        )
    if function is None:
        raise ValueError(
            "A .keras file that is served must hold a Sequential or functional model, whose inputs and "
            f"outputs are known. Received: {type(model).__name__} {model.name!r}. Export it instead, and "
            "serve the SavedModel: model.export('folder')."
        )
    takes = _ports(input_structure(function), function.inputs)
    takes = [_with_hints(one, function, tensor) for one, tensor in zip(takes, function.inputs, strict=True)]
    return takes, _ports(output_structure(function), function.outputs)


def _with_hints(one: Port, function: keras.Function, tensor: keras.KerasTensor) -> Port:
    """The input, and what the layers that take it say of its values."""
    spec = replace(one.spec, optional=bool(getattr(maker_of(tensor), "optional", False)))
    takers = [
        node.operation
        for node in nodes_of(function)
        if any(tensor is taken for taken in node.arguments.keras_tensors)
    ]
    words: list[Any] = []
    below: list[int] = []
    for taker in takers:
        if hasattr(taker, "get_vocabulary"):
            words += [word for word in taker.get_vocabulary()[:_WORDS] if word not in ("", -1)]
        below += [getattr(taker, name) for name in ("input_dim", "num_tokens") if _is_limit(taker, name)]
    return replace(one, spec=spec, words=tuple(words), below=min(below, default=None))


def _is_limit(layer: Any, name: str) -> bool:
    return isinstance(getattr(layer, name, None), int)


def as_traced(ports: Sequence[Port], tensors: Sequence[Any]) -> list[Port]:
    """Outputs of the types that a graph really gives: what Keras says of them before may be another.

    Args:
        ports: what Keras says.
        tensors: what the graph gives, as the outside sees it.

    Raises:
        ValueError: if one is ragged or sparse, or cannot be served.
    """
    found = []
    for one, tensor in zip(ports, tensors, strict=True):
        _require_dense(f"output {one.spec.name!r}", tensor)
        known = tensor.shape.rank in (None, len(one.spec.shape))
        shape = one.spec.shape if known else tensor.shape
        found.append(port(one.spec.name, tensor.dtype, shape))
    return found


def _require_dense(what: str, tensor: Any) -> None:
    if not isinstance(tensor, (tf.Tensor, tf.TensorSpec)):
        raise ValueError(
            "A model that is served must take and give dense tensors, such as ragged.to_tensor() gives. "
            f"Received: {what}, a {type(tensor).__name__.removesuffix('Spec')}."
        )


def saved_model_ports(specs: Mapping[str, tf.TensorSpec]) -> list[Port]:
    """Inputs or outputs of a SavedModel's signature.

    Raises:
        ValueError: if a tensor cannot be served, or its number of axes is not known.
    """
    ports = []
    for name, spec in specs.items():
        _require_dense(f"tensor {name!r}", spec)
        if spec.shape.rank is None:
            raise ValueError(
                f"Tensor {name!r} of the SavedModel must have a known number of axes, so that its batch axis "
                "is known. Received: a shape that is open altogether."
            )
        ports.append(port(name, spec.dtype, spec.shape))
    return ports


def _ports(structure, tensors) -> list[Port]:
    for tensor in tensors:
        if getattr(tensor, "sparse", False) or getattr(tensor, "ragged", False):
            raise ValueError(f"A model that is served must use dense tensors. Received: {tensor}.")
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    if isinstance(structure, Mapping):
        names = ["_".join(map(str, path)) for path in paths]
    else:
        names = [maker_of(tensor).name for tensor in tensors]
    return [port(n, dtype_of(t), t.shape) for n, t in zip(_unique(names), tensors, strict=True)]


def _unique(names: Sequence[str]) -> list[str]:
    """Names that occur again get a number: a, b, a_1."""
    unique: list[str] = []
    for name in names:
        found, number = name, 0
        while found in unique or (number and found in names):
            number += 1
            found = f"{name}_{number}"
        unique.append(found)
    return unique


def to_tensor(one: Port, array: np.ndarray) -> tf.Tensor:
    """What enters the model at this port; BYTES as bytes.

    Raises:
        ValueError: if `array` is of another type.
    """
    if one.outer == tf.string:
        return tf.constant(array.tolist(), tf.string, array.shape)
    if array.dtype != one.outer.as_numpy_dtype:
        raise ValueError(
            f"Input {one.spec.name!r} must be of type {one.spec.datatype}. Received: {array.dtype}."
        )
    return tf.constant(array)
