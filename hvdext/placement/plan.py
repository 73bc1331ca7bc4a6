"""Which layer goes where: `plan` finds the best assignment, `Plan` holds, prints, draws and stores it.

What a place costs, without a unit:

    cost_p = load_p / load of the whole model + crossing * arriving_p / bytes of all tensors of the model

`load_p` is what is balanced, summed over the layers at p:

    "parameters"   elements of the weights
    "flops"        floating-point operations of a forward pass per sample
    "measured"     seconds of a forward and a backward pass
    "memory"       bytes: weights + gradients + optimizer slots + activations of a batch (`memory_p`)

    memory_p = variables + trained variables * (1 + slots) + batch_size * (activations + arriving_p)

`arriving_p` is what comes to p from other places, in bytes per sample: each tensor once, however many layers
at p take it. It is as much that goes back as gradients. A plan keeps the dearest place as cheap as can be,
`min max_p cost_p`; among those, the sum of squared costs is smallest.

The layers are cut in their topological order, so that each place holds neighbours, and none is empty. The
optimum over all such cuts is found by dynamic programming (`hvdext.placement.partition`).
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdext.common.arguments import suggests_keywords
from hvdext.placement.graph import Graph, Layer, Tensor
from hvdext.placement.ordering import units_of
from hvdext.placement.partition import arrivals, cheapest, partition, run_sums

if TYPE_CHECKING:
    import keras

_LOADS: Mapping[str, Callable[[Layer], float]] = {
    "parameters": lambda layer: layer.parameters,
    "flops": lambda layer: layer.flops,
    "measured": lambda layer: layer.seconds,
}
BALANCES = (*_LOADS, "memory")


@suggests_keywords
def plan(
    model: keras.Model | Callable[[], keras.Model] | Graph,
    places: int,
    balance: str = "parameters",
    pins: Mapping[str, int] | None = None,
    max_memory: int | None = None,
    *,
    forward_only: bool = True,
    batch_size: int = 32,
    slots: int | None = None,
    crossing: float = 1.0,
    samples: Any = None,
) -> Plan:
    """Assigns each layer of `model` to one of `places` places.

    The best of all cuts of the layers' topological order; the module's docstring has the formulas.

    Args:
        model: a Sequential or functional model, built, with whatever branches, shared layers and nested
            models; a function without arguments that returns one, whose weights are then never allocated; or
            what `hvdext.placement.reading.read` has made of one.
        places: devices or pipeline stages, at least 1.
        balance: what the places get equal shares of: "parameters", "memory", "flops" or "measured".
        pins: place by layer: `{"encoder/*": 0, "head": 3}`. Keys are paths or shell-style patterns that match
            whole paths; each must match a layer.
        max_memory: bytes that no place may exceed, counted as for balance="memory".
        forward_only: whether tensors go on to later places only, which a pipeline needs. A layer that is
            called again later shares its place with all that lies between, and layers with a common variable
            share theirs. False: such a layer is where it is called first and tensors travel back to it; fine
            for `hvd.place`.
        batch_size: samples whose activations are kept at once, at least 1, for the memory.
        slots: optimizer variables per trained parameter, for the memory; None: those of the model's
            optimizer, or Adam's 2 if it is not compiled.
        crossing: what tensors between places weigh in the cost, at least 0. A tensor of the model's average
            size that crosses costs as much as `crossing / number of tensors` of the model's load; increase
            it where links are slow.
        samples: inputs of the model, for balance="measured"; None: made up from the inputs' shapes. Times
            differ from process to process: ranks take one rank's plan (`hvd.broadcast_object`).

    Raises:
        TypeError, ValueError: if an argument breaks its rule; the model cannot be read; there are more places
            than layers that can be apart; pins contradict each other or leave a place without a layer; or no
            plan keeps to `max_memory`: the message says the least that would do.
    """
    _check_settings(places, balance, max_memory, batch_size, slots, crossing, samples)
    graph = _graph_of(model, balance, samples, batch_size)
    slots = next(n for n in (slots, graph.slots, 2) if n is not None)
    pinned = _pinned({} if pins is None else pins, graph, places)
    units = units_of(graph, pinned, forward_only)
    if places > len(units):
        raise ValueError(_too_many_places(places, units, graph, forward_only))

    arriving = arrivals(len(units), _tensors_between(graph, units))
    memory = run_sums(_per_unit(graph, units, lambda layer: memory_of(layer, batch_size, slots)))
    memory = memory + batch_size * arriving
    load = memory if balance == "memory" else run_sums(_per_unit(graph, units, _LOADS[balance]))
    cost = _shares(load, arriving, crossing, graph)
    may_hold = _runs_by_pins(units, pinned, places)
    if max_memory is not None:
        least = cheapest([np.where(may, memory, np.inf) for may in may_hold])
        if np.isfinite(least) and least > max_memory:
            raise ValueError(
                f"`max_memory` must be at least {math.ceil(least)} bytes for this model with "
                f"places={places}, batch_size={batch_size} and slots={slots}"
                f"{' and these pins' if pinned else ''}. Received: max_memory={max_memory}."
            )
        cost = np.where(memory <= max_memory, cost, np.inf)
    borders = partition([np.where(may, cost, np.inf) for may in may_hold])
    if borders is None:
        raise ValueError(
            f"`pins` must leave at least one layer for each of the {places} places. Received: pins={pins!r}."
        )
    stages = [tuple(path for unit in units[a:b] for path in unit) for a, b in itertools.pairwise(borders)]
    stages[0] += tuple(layer.path for layer in graph.layers if layer.is_input)
    return Plan(graph, tuple(stages), balance, batch_size, slots, float(crossing))


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


@suggests_keywords
@dataclass(frozen=True)
class Plan:
    """Which layer is where. Inputs of the model are at place 0.

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
            nearest = difflib.get_close_matches(path, self.assignment, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
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
        return _LOADS[self.balance](layer)

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

    def table(self) -> str:
        """The plan as text: what each place carries, and what crosses."""
        from hvdext.placement.table import as_text

        return as_text(self)

    def draw(self, path: str | os.PathLike) -> None:
        """Draws the plan into the image file at `path`: who is where, how heavy, and what crosses.

        Raises:
            ImportError: if matplotlib is not installed (`pip install matplotlib`).
        """
        from hvdext.placement.drawing import draw

        draw(self, path)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan to the YAML file at `path`; `Plan.load` gives the same plan.

        In the file each layer is one line: edit its `place` and load it again.
        """
        from hvdext.placement.plan_file import write

        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Reads a plan from a YAML file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is no plan, or its layers are not placed as `Plan` demands.
        """
        from hvdext.placement.plan_file import read

        return read(path)

    def check(self, model: keras.Model | Graph) -> None:
        """Makes sure that this is a plan for `model`: the same layers, by path, class and size.

        Raises:
            ValueError: if they differ; the message names those that do.
        """
        graph = model if isinstance(model, Graph) else _read(model)
        ours, theirs = self.graph.by_path, graph.by_path
        missing = [path for path in theirs if path not in ours]
        unknown = [path for path in ours if path not in theirs]
        other = [p for p in ours if p in theirs and not _are_alike(ours[p], theirs[p])]
        if missing or unknown or other:
            parts = {
                "only in the model": missing,
                "only in the plan": unknown,
                "of another class or size": other,
            }
            listed = "; ".join(f"{what}: {_some(paths)}" for what, paths in parts.items() if paths)
            raise ValueError(
                f"`plan` must be a plan for the model {graph.name!r}. Received: one for {self.model!r}; "
                f"{listed}. Keras numbers layers without a name through the whole process: name them, or "
                "call keras.utils.clear_session() before the model is built again."
            )

    def __str__(self) -> str:
        return self.table()

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
            cost=share + self.crossing * _of_all_tensors(arriving, self.graph),
        )

    @functools.cached_property
    def _whole_load(self) -> float:
        return sum(map(self.load_of, self.graph.layers))


# -- the pieces of `plan` ---------------------------------------------------------------------------------


def _graph_of(model, balance, samples, batch_size) -> Graph:
    graph = model if isinstance(model, Graph) else _read(model)
    if balance == "measured" and not isinstance(model, Graph):
        from hvdext.placement.measuring import measured

        graph = measured(model, graph, samples, batch_size)
    return graph


def _read(model) -> Graph:
    from hvdext.placement.reading import read  # imports Keras, which nothing else here needs

    return read(model)


def _pinned(pins: Mapping[str, int], graph: Graph, places: int) -> dict[str, int]:
    """Place by path for each pinned layer."""
    if not isinstance(pins, Mapping):
        raise TypeError(f"`pins` must be a mapping from layer paths to places. Received: pins={pins!r}.")
    found: dict[str, tuple[int, str]] = {}
    paths = [layer.path for layer in graph.placed]
    for pattern, place in pins.items():
        if not _is_whole(place) or not 0 <= place < places:
            raise ValueError(
                f"`pins` must hold places from 0 to {places - 1}. Received: {pattern!r}: {place!r}."
            )
        matches = [path for path in paths if fnmatchcase(path, pattern)]
        if not matches:
            nearest = difflib.get_close_matches(pattern, paths, n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"There are: {_some(paths)}."
            raise ValueError(f"`pins` must match layers. Received: {pattern!r}, which matches none. {hint}")
        for path in matches:
            other = found.setdefault(path, (place, pattern))
            if other[0] != place:
                raise ValueError(
                    "`pins` must not contradict each other. "
                    f"Received: {path!r} at place {other[0]} by {other[1]!r} and at {place} by {pattern!r}."
                )
    return {path: place for path, (place, _) in found.items()}


def _tensors_between(graph: Graph, units) -> list[tuple[int, list[int], int]]:
    """(producing unit, consuming units, bytes); what the inputs give is in the first unit's place anyway."""
    number = {path: i for i, unit in enumerate(units) for path in unit}
    return [
        (number.get(tensor.producer, 0), [number[path] for path in tensor.consumers], tensor.bytes)
        for tensor in graph.tensors
    ]


def _per_unit(graph: Graph, units, load: Callable) -> np.ndarray:
    return np.array([sum(load(graph.by_path[path]) for path in unit) for unit in units], dtype=np.float64)


def _shares(load: np.ndarray, arriving: np.ndarray, crossing: float, graph: Graph) -> np.ndarray:
    whole = load[0, -1]  # the run of all units, at which nothing arrives
    share = load / whole if whole else np.where(np.isfinite(load), 0.0, np.inf)
    return share + crossing * _of_all_tensors(arriving, graph)


def _of_all_tensors(size, graph: Graph):
    return size / max(1, sum(tensor.bytes for tensor in graph.tensors))


def _runs_by_pins(units, pinned: Mapping[str, int], places: int) -> list[np.ndarray]:
    """For each place, which runs of units the pins let it hold; bool, shape (n + 1, n + 1)."""
    n = len(units)
    pin_of = [next((pinned[path] for path in unit if path in pinned), None) for unit in units]
    rows = np.arange(n + 1)
    allowed = []
    for place in range(places):
        elsewhere = np.cumsum([0] + [pin is not None and pin != place for pin in pin_of])
        allowed.append((elsewhere[:, None] == elsewhere[None, :]) & (rows[:, None] < rows[None, :]))
    return allowed


# -- checks and messages ----------------------------------------------------------------------------------


def _check_settings(places, balance, max_memory, batch_size, slots, crossing, samples):
    _require(_is_whole(places) and places >= 1, "places", places, "be a whole number, at least 1")
    if balance not in BALANCES:
        nearest = difflib.get_close_matches(str(balance), BALANCES, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        _require(False, "balance", balance, f"be one of {', '.join(map(repr, BALANCES))}", hint)
    _require(
        max_memory is None or (_is_number(max_memory) and max_memory > 0),
        "max_memory",
        max_memory,
        "be a positive number of bytes, or None",
    )
    _require(_is_whole(batch_size) and batch_size >= 1, "batch_size", batch_size, "be at least 1 sample")
    _require(
        slots is None or (_is_whole(slots) and slots >= 0),
        "slots",
        slots,
        "be a whole number, at least 0, or None",
    )
    _require(
        _is_number(crossing) and 0 <= crossing < math.inf, "crossing", crossing, "be a number, at least 0"
    )
    _require(
        samples is None or balance == "measured", "samples", "...", 'be left out unless balance="measured"'
    )


def _require(ok, name, value, rule, hint=""):
    if not ok:
        raise ValueError(f"`{name}` must {rule}. Received: {name}={value!r}.{hint}")


def _is_whole(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _too_many_places(places, units, graph, forward_only) -> str:
    received = f"Received: places={places}."
    if len(units) == len(graph.placed):
        return f"`places` must be at most the number of layers, {len(units)}. {received}"
    largest = max(units, key=len)
    return (
        f"`places` must be at most the number of layers that can be apart, {len(units)}. {received} "
        f"{len(largest)} layers stay together, since one of them is called again after another or they "
        f"hold a common variable: {_some(largest)}. With forward_only=False they need not, but then tensors "
        "go back to earlier places, which no pipeline can do."
    )


def _are_alike(a, b):
    return (a.kind, a.parameters, a.is_input) == (b.kind, b.parameters, b.is_input)


def _some(paths: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(map(repr, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
