"""What a model's function changes each time it is called: read off its graph, before any batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_CALLS = (
    "PartitionedCall",
    "StatefulPartitionedCall",
)  # of these a function runs once, of others as often as
_WRITES = (  # it likes
    "Assign",
    "ResourceScatter",
    "ResourceApply",
    "ResourceStridedSliceAssign",
    "Rng",
    "Stateful",
    "LookupTableInsert",
    "LookupTableRemove",
    "LookupTableImport",
)
_RANDOM = (  # operations whose state is no variable
    "RandomUniform",
    "RandomUniformInt",
    "RandomStandardNormal",
    "TruncatedNormal",
    "ParameterizedTruncatedNormal",
    "RandomGamma",
    "RandomPoisson",
    "RandomPoissonV2",
    "RandomShuffle",
    "Multinomial",
    "FractionalMaxPool",
    "FractionalAvgPool",
    "SampleDistortedBoundingBox",
    "SampleDistortedBoundingBoxV2",
    "UniformCandidateSampler",
    "LogUniformCandidateSampler",
    "LearnedUnigramCandidateSampler",
    "FixedUnigramCandidateSampler",
    "ThreadUnsafeUnigramCandidateSampler",
    "AllCandidateSampler",
)
_STEPS = {"AddV2": True, "FloorMod": False}  # what a `SeedGenerator` makes its next state by: ordered or not


@dataclass(frozen=True)
class Generator:
    """The state of a `keras.random.SeedGenerator` that each call moves by the same number of draws.

    Attributes:
        variable: the state.
        draws: in each call.
        is_ordered: whether it counts; otherwise it is the global one, which jumps.
    """

    variable: tf.Variable
    draws: int
    is_ordered: bool

    def after(self, state: np.ndarray, calls: int) -> np.ndarray:
        """The state that `calls` calls make of `state`, as `SeedGenerator.next` would."""
        count = self.draws * calls
        if self.is_ordered:
            return state + np.array([0, count], state.dtype)
        for _ in range(count):
            state = (state + 1) * 5387 % 933199
        return state


@dataclass
class Moving:
    """What a call moves.

    Attributes:
        generators: that it draws from.
        others: variables and tables besides, by name.
        operations: random operations whose state nobody holds.
        uncountable: generators that it draws from in loops or conditions, by name.
    """

    generators: list[Generator] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    uncountable: list[str] = field(default_factory=list)


def moving(function: Any, but: Iterable[keras.Variable] = ()) -> Moving:
    """What `function` changes when it is called.

    Args:
        function: a `tf.types.experimental.ConcreteFunction`.
        but: variables that it may change.
    """
    graph = function.graph.as_graph_def()
    captured = function.captured_inputs
    places = [
        tensor.name.partition(":")[0] for tensor in function.inputs[len(function.inputs) - len(captured) :]
    ]
    walk = _Walk({one.signature.name: one for one in graph.library.function})
    walk.go(graph.node, {place: i for i, place in enumerate(places)}, is_counted=True)
    variables = {id(variable.handle): variable for variable in function.graph.variables}
    allowed = {id(variable.value.handle) for variable in but}
    found = Moving(operations=sorted(walk.operations))
    for i, writes in sorted(walk.writes.items()):
        variable = variables.get(id(captured[i]))
        name = places[i] if variable is None else variable.name.partition(":")[0]
        kinds = {kind for _, kind in writes}
        if id(captured[i]) in allowed:
            continue
        if variable is None or not name.endswith("seed_generator_state") or not kinds <= {True, False}:
            found.others.append(name)
        elif len(kinds) > 1 or not all(is_counted for is_counted, _ in writes):
            found.uncountable.append(name)
        else:
            found.generators.append(Generator(variable, len(writes), kinds == {True}))
    return found


class _Walk:
    """Goes through a graph and the functions that it calls.

    Attributes:
        writes: for each captured resource, by its number: of each write whether it happens once per call, and
            whether it is an ordered draw (None: no draw).
        operations: random operations with a state of their own.
    """

    def __init__(self, library):
        self.writes: dict[int, list[tuple[bool, bool | None]]] = {}
        self.operations: set[str] = set()
        self._library = library

    def go(self, nodes, resources, is_counted):
        """Reads nodes, in which `resources` says which names are captured resources."""
        by_name = {node.name: node for node in nodes}

        def origin(reference):
            name = reference.partition(":")[0]
            while name not in resources:
                node = by_name.get(name)
                if node is None or node.op != "Identity":
                    return None
                name = node.input[0].partition(":")[0]
            return resources[name]

        for node in nodes:
            inputs = [reference for reference in node.input if not reference.startswith("^")]
            called = [self._library[name] for name in _functions_of(node) if name in self._library]
            for function in called:
                names = [argument.name for argument in function.signature.input_arg]
                given = dict(zip(names, map(origin, inputs[len(inputs) - len(names) :]), strict=True))
                known = {name: place for name, place in given.items() if place is not None}
                self.go(function.node_def, known, is_counted and node.op in _CALLS)
            if node.op in _RANDOM:
                self.operations.add(node.op)
            if node.op.startswith(_WRITES) and not called and inputs:
                place = origin(inputs[0])
                if place is not None:
                    maker = by_name.get(inputs[-1].partition(":")[0])
                    kind = _STEPS.get(maker.op) if maker is not None else None
                    self.writes.setdefault(place, []).append((is_counted, kind))


def _functions_of(node):
    for value in node.attr.values():
        yield from [value.func.name] if value.HasField("func") else [f.name for f in value.list.func]
