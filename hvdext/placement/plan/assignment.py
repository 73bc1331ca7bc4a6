"""An assignment of layers to places, and what it costs.

What a place costs, without a unit:

    cost_p = load_p / load of the whole model + crossing * arriving_p / bytes of all tensors of the model

`load_p` is what is balanced, summed over the layers at p:

    "parameters"   elements of the weights
    "flops"        floating-point operations of a forward pass per sample
    "measured"     seconds of a forward and a backward pass
    "memory"       bytes: weights + gradients + optimizer slots + activations of a batch (`memory_p`)

    memory_p = variables + trained variables * (1 + slots) + batch_size * (activations + arriving_p)

`arriving_p` is what comes to p from other places, in bytes per sample: each tensor once, however many layers
at p take it. It is as much that goes back as gradients.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvdext.common.checks import did_you_mean
from hvdext.placement.plan.graph import Graph, Layer, Tensor

LOADS: Mapping[str, Callable[[Layer], float]] = {
    "parameters": lambda layer: layer.parameters,
    "flops": lambda layer: layer.flops,
    "measured": lambda layer: layer.seconds,
}


BALANCES = (*LOADS, "memory")


def memory_of(layer: Layer, batch_size: int, slots: int) -> int:
    """Bytes that a layer takes in training, without what arrives from other places."""
    trained = layer.trainable_bytes * (1 + slots)
    return layer.weight_bytes + trained + batch_size * layer.activation_bytes


@dataclass(frozen=True)
class PlaceCost:
    """What one place carries.

    Attributes:
        layers: how many, without inputs.
        parameters: elements of its weights.
        weight_bytes: bytes of its variables.
        memory_bytes: bytes in training, as for balance="memory".
        flops: per sample, forward.
        seconds: measured; 0.0 if not.
        arriving_bytes: per sample, from other places.
        share: of the model's load, 0 to 1.
        cost: what the plan kept as small as possible; without a unit.
    """

    layers: int
    parameters: int
    weight_bytes: int
    memory_bytes: int
    flops: int
    seconds: float
    arriving_bytes: int
    share: float
    cost: float


@dataclass(frozen=True)
class Crossing:
    """A tensor that goes from one place to another.

    Attributes:
        tensor: its name, producer, shape, dtype and bytes per sample.
        source: the place where it is made.
        target: the place where it is taken; below `source` only in plans that are not forward only.
    """

    tensor: Tensor
    source: int
    target: int


@dataclass(frozen=True)
class Assignment:
    """Which layer is where, what each place then carries, and what crosses: the data of a `Plan`.

    Attributes:
        graph: the model.
        stages: for each place the paths of its layers, in the order in which they are first called.
        balance: what the places were to get equal shares of.
        batch_size: samples whose activations count as memory.
        slots: optimizer variables per trained parameter that count as memory.
        crossing: what tensors between places weigh in the cost.

    Raises:
        ValueError: if a layer is missing, unknown or in two places, a place has none, or an input is not at
            place 0.
    """

    graph: Graph
    stages: tuple[tuple[str, ...], ...]
    balance: str = "parameters"
    batch_size: int = 32
    slots: int = 2
    crossing: float = 1.0

    def __post_init__(self):
        listed = [path for stage in self.stages for path in stage]
        twice = [path for path, times in Counter(listed).items() if times > 1]
        missing = [path for path in self.graph.by_path if path not in set(listed)]
        unknown = [path for path in listed if path not in self.graph.by_path]
        if twice or missing or unknown:
            raise ValueError(
                "`stages` must hold each layer of the model once. "
                f"Received: twice {twice}, not at all {missing}, unknown {unknown}."
            )
        for place, stage in enumerate(self.stages):
            layers = [self.graph.by_path[path] for path in stage]
            if all(layer.is_input for layer in layers):
                raise ValueError(f"Each place must have a layer. Received: none at place {place}.")
            if place and any(layer.is_input for layer in layers):
                raise ValueError(f"Inputs must be at place 0. Received: {stage} at place {place}.")
        rank = {path: number for number, path in enumerate(self.graph.by_path)}
        ordered = tuple(tuple(sorted(stage, key=rank.__getitem__)) for stage in self.stages)
        object.__setattr__(self, "stages", ordered)

    @property
    def model(self) -> str:
        """The model's name."""
        return self.graph.name

    @property
    def places(self) -> int:
        """How many places there are."""
        return len(self.stages)

    @functools.cached_property
    def assignment(self) -> Mapping[str, int]:
        """Place by layer path, place by place."""
        return {path: place for place, stage in enumerate(self.stages) for path in stage}

    def place_of(self, path: str) -> int:
        """The place of the layer at `path`.

        Raises:
            ValueError: if there is no such layer.
        """
        if path not in self.assignment:
            hint = did_you_mean(path, self.assignment)
            raise ValueError(f"`path` must be a layer of {self.model!r}. Received: path={path!r}.{hint}")
        return self.assignment[path]

    def layers_of(self, place: int) -> tuple[str, ...]:
        """The paths of the layers at `place`, in the order of their first calls, with inputs at the front.

        Raises:
            ValueError: if there is no such place.
        """
        if not 0 <= place < self.places:
            raise ValueError(f"`place` must lie in 0 to {self.places - 1}. Received: place={place!r}.")
        return self.stages[place]

    def load_of(self, layer: Layer) -> float:
        """What `layer` adds to the load that is balanced, in its unit."""
        if self.balance == "memory":
            return memory_of(layer, self.batch_size, self.slots)
        return LOADS[self.balance](layer)

    @functools.cached_property
    def crossings(self) -> tuple[Crossing, ...]:
        """Each tensor and place that it goes to, in the order in which the tensors come into being."""
        found = []
        for tensor in self.graph.tensors:
            source = self.assignment[tensor.producer]
            for target in sorted({self.assignment[path] for path in tensor.consumers} - {source}):
                found.append(Crossing(tensor, source, target))
        return tuple(found)

    @property
    def is_forward_only(self) -> bool:
        """Whether tensors only go on to later places and no variable is at two: what a pipeline needs."""
        on = all(crossing.source < crossing.target for crossing in self.crossings)
        return on and all(len({self.assignment[path] for path in group}) == 1 for group in self.graph.shared)

    @functools.cached_property
    def costs(self) -> tuple[PlaceCost, ...]:
        """What each place carries."""
        arriving = [0] * self.places
        for crossing in self.crossings:
            arriving[crossing.target] += crossing.tensor.bytes
        return tuple(self._cost(stage, arriving[place]) for place, stage in enumerate(self.stages))

    def _cost(self, stage, arriving: int) -> PlaceCost:
        layers = [self.graph.by_path[path] for path in stage]
        memory = sum(memory_of(layer, self.batch_size, self.slots) for layer in layers)
        memory += self.batch_size * arriving
        whole = self._whole_load
        load = memory if self.balance == "memory" else sum(map(self.load_of, layers))
        share = load / whole if whole else 0.0
        return PlaceCost(
            layers=sum(not layer.is_input for layer in layers),
            parameters=sum(layer.parameters for layer in layers),
            weight_bytes=sum(layer.weight_bytes for layer in layers),
            memory_bytes=memory,
            flops=sum(layer.flops for layer in layers),
            seconds=sum(layer.seconds for layer in layers),
            arriving_bytes=arriving,
            share=share,
            cost=share + self.crossing * of_all_tensors(arriving, self.graph),
        )

    @functools.cached_property
    def _whole_load(self) -> float:
        return sum(map(self.load_of, self.graph.layers))


def of_all_tensors(size, graph: Graph):
    """`size` bytes as a share of the bytes of all tensors of the model."""
    return size / max(1, sum(tensor.bytes for tensor in graph.tensors))


def some(paths: Sequence[str], most: int = 8) -> str:
    """The first of `paths`, for a message, and how many more there are."""
    shown = ", ".join(map(repr, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
