"""The row in which layers are cut into places: what stays together, and what comes before what. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

from hvdext.placement.plan.graph import Graph


def units_of(graph: Graph, pins: Mapping[str, int], forward_only: bool) -> list[tuple[str, ...]]:
    """The layers without the inputs, as units that are not cut, in the order in which they are dealt.

    A unit is one layer, or, with `forward_only`, the layers that must share a place if no tensor may go back
    to an earlier one: those in a loop through a layer that is called again, and those that hold a common
    variable. The order is topological (without `forward_only`: by the first calls) and otherwise keeps a
    branch together. Where the pins ask for it, one branch comes before another.

    Args:
        graph: the model.
        pins: place by path, for the pinned layers.
        forward_only: whether tensors may only go on to later places.

    Raises:
        ValueError: if pins contradict each other.
    """
    rank = {layer.path: number for number, layer in enumerate(graph.placed)}
    arrows = [(a, b) for a, b, _ in graph.edges() if a in rank and a != b]
    if forward_only:
        ties = [pair for group in graph.shared for pair in _cycle(group)]
        groups = _components(rank, arrows + ties)
    else:
        arrows = [(a, b) for a, b in arrows if rank[a] < rank[b]]
        groups = [[path] for path in rank]
    units = [tuple(sorted(group, key=rank.__getitem__)) for group in groups]
    unit_of = {path: unit for unit in units for path in unit}
    followers: dict[tuple, dict[tuple, None]] = {unit: {} for unit in units}
    for a, b in arrows:
        if unit_of[a] != unit_of[b]:
            followers[unit_of[a]][unit_of[b]] = None
    return _ordered(units, followers, {unit: _pin_of(unit, pins) for unit in units}, rank)


def _pin_of(unit, pins) -> tuple[int, str] | None:
    """Place and path of the pinned layer in `unit`."""
    found = [(pins[path], path) for path in unit if path in pins]
    for place, path in found[1:]:
        if place != found[0][0]:
            raise ValueError(
                "`pins` must not contradict each other. "
                f"Received: {found[0][1]!r} at place {found[0][0]} and {path!r} at place {place}, which stay "
                "together, since a layer is called again after the other or they hold a common variable."
            )
    return found[0] if found else None


def _ordered(units, followers, pin_of, rank) -> list[tuple[str, ...]]:
    """Kahn's algorithm; first by the lowest place that the pins before a unit leave it, then by `rank`."""
    waits = dict.fromkeys(units, 0)
    for unit in units:
        for follower in followers[unit]:
            waits[follower] += 1
    lowest: dict[tuple, tuple[int, str]] = dict.fromkeys(units, (0, ""))  # place, path of who says so
    ready: list[tuple[int, int, tuple]] = []

    def add(unit):
        if pin_of[unit]:
            if pin_of[unit][0] < lowest[unit][0]:
                (high, before), (low, after) = lowest[unit], pin_of[unit]
                raise ValueError(
                    "`pins` must not contradict each other: no layer can be at a lower place than one before "
                    f"it. Received: {before!r} at place {high}, and after it {after!r} at place {low}."
                )
            lowest[unit] = pin_of[unit]
        heapq.heappush(ready, (lowest[unit][0], rank[unit[0]], unit))

    for unit in units:
        if not waits[unit]:
            add(unit)
    order = []
    while ready:
        _, _, unit = heapq.heappop(ready)
        order.append(unit)
        for follower in followers[unit]:
            lowest[follower] = max(lowest[follower], lowest[unit])
            waits[follower] -= 1
            if not waits[follower]:
                add(follower)
    return order


def _cycle(group: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(group, [*group[1:], group[0]], strict=True))


def _components(nodes: Iterable[str], arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components (Tarjan 1972), without recursion: models are deep."""
    nodes = list(nodes)
    followers: dict[str, list[str]] = {node: [] for node in nodes}
    for a, b in arrows:
        followers[a].append(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    on_stack: set[str] = set()
    found = []
    for root in nodes:
        if root in index:
            continue
        work = [(root, iter(followers[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for follower in rest:
                if follower not in index:
                    index[follower] = low[follower] = len(index)
                    stack.append(follower)
                    on_stack.add(follower)
                    work.append((follower, iter(followers[follower])))
                    break
                if follower in on_stack:
                    low[node] = min(low[node], index[follower])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component: list[str] = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(component)
    return found
