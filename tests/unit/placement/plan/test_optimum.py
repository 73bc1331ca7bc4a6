"""The optimum, against all contiguous plans of random small graphs; costs worked out from the definition."""

import itertools
import random
import re

import pytest

from hvdext.placement.plan.graph import Layer
from hvdext.placement.plan.planner import plan


def _random_graph(graph_of, rng, kind):
    """Layers a, b, c, ...; whatever edges there are go to later letters, except with kind="loops"."""
    paths = "abcdefgh"[: rng.randint(2, 8)]
    layers = {
        path: Layer(
            path,
            "Dense",
            parameters=rng.choice([0, 0, 1, 5, 20, 100]),
            weight_bytes=rng.randrange(400),
            trainable_bytes=rng.randrange(300),
            activation_bytes=rng.randrange(64),
            flops=rng.randrange(1000),
            seconds=rng.random(),
        )
        for path in paths
    }
    edges = [("x", 4 * rng.randint(1, 9), [paths[0], *rng.sample(paths[1:], rng.randint(0, 1))])]
    for i, path in enumerate(paths):
        for _ in range(rng.randint(1, 2)):
            candidates = paths[i + 1 :] if kind != "loops" else paths
            takers = rng.sample(candidates, min(len(candidates), rng.randint(0, 3)))
            if kind == "pinned" and i + 1 < len(paths):  # only one topological order, whatever the pins say
                takers = list({paths[i + 1], *takers})
            edges.append((path, 4 * rng.randint(1, 30), takers))
    return graph_of(layers, edges)


def _all_plans(graph, places):
    paths = [layer.path for layer in graph.placed]
    for borders in itertools.combinations(range(1, len(paths)), places - 1):
        yield {
            path: place
            for place, (a, b) in enumerate(itertools.pairwise([0, *borders, len(paths)]))
            for path in paths[a:b]
        }


def _arriving(graph, where, place):
    """Bytes: each tensor once, if someone here takes it and it is made elsewhere; inputs are made at 0."""
    return sum(
        tensor.bytes
        for tensor in graph.tensors
        if where.get(tensor.producer, 0) != place and any(where[path] == place for path in tensor.consumers)
    )


def _memory(graph, where, place, batch_size, slots):
    layers = [layer for layer in graph.placed if where[layer.path] == place]
    return (
        sum(layer.weight_bytes for layer in layers)
        + sum(layer.trainable_bytes for layer in layers) * (1 + slots)
        + batch_size * sum(layer.activation_bytes for layer in layers)
        + batch_size * _arriving(graph, where, place)
    )


def _costs(graph, where, places, settings):
    def load(at, place):
        if settings["balance"] == "memory":
            return _memory(graph, at, place, settings["batch_size"], settings["slots"])
        field = {"parameters": "parameters", "flops": "flops", "measured": "seconds"}[settings["balance"]]
        return sum(getattr(layer, field) for layer in graph.placed if at[layer.path] == place)

    whole = load(dict.fromkeys(where, 0), 0)
    everything = sum(tensor.bytes for tensor in graph.tensors)
    return [
        (load(where, place) / whole if whole else 0.0)
        + settings["crossing"] * _arriving(graph, where, place) / everything
        for place in range(places)
    ]


@pytest.mark.parametrize("kind", ["branches", "pinned", "loops", "narrow"])
def test_no_contiguous_plan_is_better(graph_of, kind):
    rng = random.Random(kind)
    refused = 0
    for _ in range(60):
        graph = _random_graph(graph_of, rng, kind)
        places = rng.randint(1, min(4, len(graph.placed)))
        settings = {
            "balance": rng.choice(["parameters", "memory", "flops", "measured"]),
            "batch_size": rng.randint(1, 8),
            "slots": rng.randint(0, 2),
            "crossing": rng.choice([0.0, 0.5, 1.0, 5.0]),
        }
        rivals = list(_all_plans(graph, places))
        pins = {}
        if kind == "pinned":
            pins = dict(rng.sample(list(rng.choice(rivals).items()), 2))
            rivals = [where for where in rivals if pins.items() <= where.items()]
        limit = None
        peaks = [
            max(_memory(graph, where, p, settings["batch_size"], settings["slots"]) for p in range(places))
            for where in rivals
        ]
        if kind == "narrow":
            limit = rng.choice([*peaks, min(peaks) - 1])
            rivals = [where for where, peak in zip(rivals, peaks, strict=True) if peak <= limit]

        def make(graph=graph, places=places, pins=pins, limit=limit, settings=settings):
            return plan(graph, places, pins=pins, max_memory=limit, forward_only=kind != "loops", **settings)

        if not rivals:
            refused += 1
            with pytest.raises(ValueError, match=rf"`max_memory` must be at least {min(peaks)} bytes"):
                make()
            continue
        found = make()
        where = {path: place for path, place in found.assignment.items() if path != "x"}
        costs = [_costs(graph, rival, places, settings) for rival in rivals]
        best = min((max(cost), sum(c * c for c in cost)) for cost in costs)
        ours = _costs(graph, where, places, settings)
        assert where in rivals
        assert max(ours) == pytest.approx(best[0], rel=1e-12)
        equals = [sum(c * c for c in cost) for cost in costs if max(cost) <= best[0] * (1 + 1e-12)]
        assert sum(c * c for c in ours) == pytest.approx(min(equals), rel=1e-9)
        assert [place.cost for place in found.costs] == pytest.approx(ours, rel=1e-12)
        assert [place.memory_bytes for place in found.costs] == [
            _memory(graph, where, p, settings["batch_size"], settings["slots"]) for p in range(places)
        ]
    assert (refused > 5) == (kind == "narrow")


def test_by_hand(graph_of):
    # Of 13 the best cut into three is 4 | 3+2 | 1+3. With what crosses, one of five equal tensors, the middle
    # one would be 5/13 + 1/5 = 0.585, and 4+3 | 2+1 | 3 has at most 7/13 = 0.538.
    layers = {"a": 4, "b": 3, "c": 2, "d": 1, "e": 3}
    graph = graph_of(layers, [(p, 8, [c]) for p, c in itertools.pairwise("xabcde")])
    assert plan(graph, 3, crossing=0).stages == (("x", "a"), ("b", "c"), ("d", "e"))
    found = plan(graph, 3)
    assert found.stages == (("x", "a", "b"), ("c", "d"), ("e",))
    assert [cost.share for cost in found.costs] == pytest.approx([7 / 13, 3 / 13, 3 / 13])
    assert [cost.cost for cost in found.costs] == pytest.approx([7 / 13, 3 / 13 + 1 / 5, 3 / 13 + 1 / 5])


def test_the_least_memory_that_would_do(graph_of):
    # 400 + 400 * 3 bytes each: two at a place are the least, and 8 * 10 arrive at the second place.
    graph = graph_of(dict.fromkeys("abc", 100), [(p, 8, [c]) for p, c in itertools.pairwise("xabc")])
    message = (
        "`max_memory` must be at least 3200 bytes for this model with places=2, batch_size=10 and slots=2."
    )
    with pytest.raises(ValueError, match=re.escape(message + " Received: max_memory=3000.")):
        plan(graph, 2, max_memory=3000, batch_size=10)
    found = plan(graph, 2, max_memory=3200, batch_size=10)
    assert [cost.memory_bytes for cost in found.costs] == [3200, 1680]
