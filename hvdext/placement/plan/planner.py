"""`plan`: the best assignment of a model's layers to places.

A plan keeps the dearest place as cheap as can be, `min max_p cost_p` (`assignment.py` has the cost); among
those, the sum of squared costs is smallest. The layers are cut in their topological order, so that each place
holds neighbours, and none is empty. The optimum over all such cuts is found by dynamic programming
(`hvdext.placement.plan.partition`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import keras
import numpy as np

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import did_you_mean, is_whole, require_number, require_whole
from hvdext.placement.plan.assignment import BALANCES, LOADS, memory_of, of_all_tensors, some
from hvdext.placement.plan.graph import Graph
from hvdext.placement.plan.ordering import units_of
from hvdext.placement.plan.partition import arrivals, cheapest, partition, run_sums
from hvdext.placement.plan.plan import Plan
from hvdext.placement.plan.reading import read


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
            what `hvdext.placement.plan.reading.read` has made of one.
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
    _require_settings(places, balance, max_memory, batch_size, slots, crossing, samples)
    graph = _graph_of(model, balance, samples, batch_size)
    slots = next(n for n in (slots, graph.slots, 2) if n is not None)
    pinned = _pinned({} if pins is None else pins, graph, places)
    units = units_of(graph, pinned, forward_only)
    if places > len(units):
        raise ValueError(_too_many_places(places, units, graph, forward_only))

    arriving = arrivals(len(units), _tensors_between(graph, units))
    memory = run_sums(_per_unit(graph, units, lambda layer: memory_of(layer, batch_size, slots)))
    memory = memory + batch_size * arriving
    load = memory if balance == "memory" else run_sums(_per_unit(graph, units, LOADS[balance]))
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


def _graph_of(model, balance, samples, batch_size) -> Graph:
    graph = model if isinstance(model, Graph) else read(model)
    if balance == "measured" and not isinstance(model, Graph):
        from hvdext.placement.plan.measuring import measured

        graph = measured(model, graph, samples, batch_size)
    return graph


def _pinned(pins: Mapping[str, int], graph: Graph, places: int) -> dict[str, int]:
    """Place by path for each pinned layer."""
    if not isinstance(pins, Mapping):
        raise TypeError(f"`pins` must be a mapping from layer paths to places. Received: pins={pins!r}.")
    found: dict[str, tuple[int, str]] = {}
    paths = [layer.path for layer in graph.placed]
    for pattern, place in pins.items():
        if not is_whole(place, 0) or place >= places:
            raise ValueError(
                f"`pins` must hold places from 0 to {places - 1}. Received: {pattern!r}: {place!r}."
            )
        matches = [path for path in paths if fnmatchcase(path, pattern)]
        if not matches:
            hint = did_you_mean(pattern, paths) or f" There are: {some(paths)}."
            raise ValueError(f"`pins` must match layers. Received: {pattern!r}, which matches none.{hint}")
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
    return share + crossing * of_all_tensors(arriving, graph)


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


def _require_settings(places, balance, max_memory, batch_size, slots, crossing, samples):
    require_whole("places", places, 1)
    if balance not in BALANCES:
        known = ", ".join(map(repr, BALANCES))
        hint = did_you_mean(balance, BALANCES)
        raise ValueError(f"`balance` must be one of {known}. Received: balance={balance!r}.{hint}")
    if max_memory is not None:
        require_number("max_memory", max_memory, lambda n: n > 0, "be a positive number of bytes, or None")
    require_whole("batch_size", batch_size, 1)
    if slots is not None:
        require_whole("slots", slots, 0)
    require_number("crossing", crossing, lambda n: 0 <= n < math.inf, "be a number, at least 0")
    if samples is not None and balance != "measured":
        raise ValueError("`samples` must be left out unless balance=\"measured\". Received: samples='...'.")


def _too_many_places(places, units, graph, forward_only) -> str:
    received = f"Received: places={places}."
    if len(units) == len(graph.placed):
        return f"`places` must be at most the number of layers, {len(units)}. {received}"
    largest = max(units, key=len)
    return (
        f"`places` must be at most the number of layers that can be apart, {len(units)}. {received} "
        f"{len(largest)} layers stay together, since one of them is called again after another or they "
        f"hold a common variable: {some(largest)}. With forward_only=False they need not, but then tensors "
        "go back to earlier places, which no pipeline can do."
    )
