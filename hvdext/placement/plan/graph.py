"""What a plan needs to know of a model: its layers, how heavy they are, and the tensors between them.

Plain data without TensorFlow or Keras; `hvdext.placement.plan.reading` fills it in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A layer, or an operation without weights, that is placed as a whole.

    Attributes:
        path: its name; inside of nested models the names that lead to it, `"encoder/dense_1"`.
        kind: its class's name.
        parameters: elements of its weights.
        weight_bytes: bytes of all its variables. A variable that two layers share counts for the first.
        trainable_bytes: bytes of those that are trained: its gradients are as large, and each kind of
            optimizer slot.
        activation_bytes: bytes per sample that backward needs of it: what its calls return, and what
            attention keeps inside.
        flops: floating-point operations per sample of a forward pass, over all its calls.
        seconds: measured time of a forward and a backward pass over all its calls; 0.0 if not measured.
        is_input: whether it stands for an input of the model.
    """

    path: str
    kind: str
    parameters: int = 0
    weight_bytes: int = 0
    trainable_bytes: int = 0
    activation_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    is_input: bool = False


@dataclass(frozen=True)
class Tensor:
    """What one call of a layer returns, and who takes it.

    Attributes:
        name: unique in the model: the producer's path, `"dense_1"`; of a later call `"dense_1@1"`, of a
            further output `"lstm:1"`.
        producer: path of the layer that returns it.
        consumers: paths of the layers that take it, each once.
        shape: with None where an axis is unknown, such as the batch.
        dtype: such as `"float32"`.
        bytes: per sample; an unknown axis counts as one.
    """

    name: str
    producer: str
    consumers: tuple[str, ...]
    shape: tuple[int | None, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Graph:
    """A model as a plan sees it.

    Attributes:
        name: the model's name.
        layers: inputs first, then in the order in which they are first called.
        tensors: in the order in which they come into being.
        outputs: names of the tensors that the model returns.
        shared: groups of paths of layers that hold a variable in common.
        slots: the model's optimizer's variables per trained parameter; None if it is not compiled.
    """

    name: str
    layers: tuple[Layer, ...]
    tensors: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    slots: int | None = None

    @functools.cached_property
    def by_path(self) -> Mapping[str, Layer]:
        """The layers by their paths, in order."""
        return {layer.path: layer for layer in self.layers}

    @functools.cached_property
    def placed(self) -> tuple[Layer, ...]:
        """The layers without the inputs."""
        return tuple(layer for layer in self.layers if not layer.is_input)

    def edges(self) -> Iterator[tuple[str, str, Tensor]]:
        """Producer's path, consumer's path and tensor, for each pair."""
        for tensor in self.tensors:
            for consumer in tensor.consumers:
                yield tensor.producer, consumer, tensor
