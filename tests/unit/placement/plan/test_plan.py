"""What a plan holds, prints, draws and stores; pins, loops and bad input."""

import dataclasses
import pickle
import re

import pytest

import hvdext as hvd
from hvdext.placement.plan.plan import Plan
from hvdext.placement.plan.planner import plan


@pytest.fixture(scope="module")
def looped(graph_of):
    """x -> a -> s -> b -> s -> c: the layer s is called before and after b."""
    layers = {"a": 3, "s": 1, "b": 4, "c": 2}
    edges = [("x", 8, ["a"]), ("a", 8, ["s"]), ("s", 12, ["b"]), ("b", 16, ["s", "c"]), ("s", 12, ["c"])]
    return graph_of(layers, edges, outputs=("c",))


@pytest.fixture(scope="module")
def towers(graph_of):
    """Two branches from one input that meet at the end."""
    layers = {"left/a": 1, "left/b": 1, "right/a": 1, "right/b": 1, "head": 1}
    edges = [
        ("x", 8, ["left/a", "right/a"]),
        ("left/a", 8, ["left/b"]),
        ("left/b", 8, ["head"]),
        ("right/a", 8, ["right/b"]),
        ("right/b", 8, ["head"]),
    ]
    return graph_of(layers, edges)


def test_a_plan_answers(looped):
    found = plan(looped, 2, forward_only=False, crossing=0)

    assert found.model == "model"
    assert found.stages == (("x", "a", "s"), ("b", "c"))
    assert found.place_of("b") == 1
    assert found.layers_of(0) == ("x", "a", "s")
    assert dict(found.assignment) == {"x": 0, "a": 0, "s": 0, "b": 1, "c": 1}
    crossings = [(c.tensor.name, c.source, c.target, c.tensor.bytes) for c in found.crossings]
    assert crossings == [("s", 0, 1, 12), ("b", 1, 0, 16), ("s@1", 0, 1, 12)]
    assert not found.is_forward_only
    assert [cost.arriving_bytes for cost in found.costs] == [16, 24]


def test_forward_only_keeps_a_loop_together(looped):
    found = plan(looped, 2, crossing=0)

    assert found.stages == (("x", "a"), ("s", "b", "c"))
    assert found.is_forward_only
    with pytest.raises(
        ValueError, match=r"layers that can be apart, 3. Received: places=4. 2 layers stay tog.*"
    ):
        plan(looped, 4)
    assert len(plan(looped, 4, forward_only=False).stages) == 4


def test_forward_only_keeps_a_common_variable_together(graph_of):
    layers = {"a": 1, "b": 9, "c": 1, "d": 1}
    edges = [("x", 8, ["a"]), ("a", 8, ["b"]), ("b", 8, ["c"]), ("c", 8, ["d"])]
    tied = graph_of(layers, edges, shared=(("a", "c"),))

    assert plan(tied, 2).stages == (("x", "a", "b", "c"), ("d",))
    apart = plan(tied, 2, forward_only=False, crossing=0)
    assert apart.stages == (("x", "a", "b"), ("c", "d"))
    assert not apart.is_forward_only


def test_pins(towers):
    assert plan(towers, 2, pins={"right/*": 0, "left/*": 1}).stages == (
        ("x", "right/a", "right/b"),
        ("left/a", "left/b", "head"),
    )
    pinned = plan(towers, 3, pins={"right/a": 1, "left/b": 1, "head": 2})
    assert pinned.layers_of(1) == ("left/b", "right/a")


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"left/*": 0, "left/a": 1}, "'left/a' at place 0 by 'left/*' and at 1 by 'left/a'"),
        (
            {"left/a": 1, "left/b": 0},
            "no layer can be at a lower place than one before it. Received: 'left/a' at",
        ),
        ({"left/a": 2, "head": 1}, "Received: 'left/a' at place 2, and after it 'head' at place 1."),
        ({"*": 1}, "must leave at least one layer for each of the 3 places. Received: pins={'*': 1}"),
        ({"head": 0}, "must leave at least one layer for each of the 3 places"),
        (
            {"lift/a": 0},
            "`pins` must match layers. Received: 'lift/a', which matches none. Did you mean 'left/a'?",
        ),
        ({"x": 0}, "`pins` must match layers. Received: 'x'"),
        ({"head": 3}, "`pins` must hold places from 0 to 2. Received: 'head': 3."),
        ({"head": "2"}, "`pins` must hold places from 0 to 2. Received: 'head': '2'."),
    ],
)
def test_pins_that_cannot_be(towers, pins, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(towers, 3, pins=pins)


def test_pins_inside_of_a_loop(looped):
    with pytest.raises(ValueError, match=r"'s' at place 0 and 'b' at place 1, which stay together"):
        plan(looped, 2, pins={"s": 0, "b": 1})
    with pytest.raises(TypeError, match="`pins` must be a mapping from layer paths to places"):
        plan(looped, 2, pins=["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"places": 0}, "`places` must be an integer of at least 1. Received: places=0."),
        ({"places": True}, "`places` must be an integer of at least 1. Received: places=True."),
        ({"places": 4}, "`places` must be at most the number of layers, 3. Received: places=4."),
        (
            {"balance": "flop"},
            "`balance` must be one of 'parameters', 'flops', 'measured', 'memory'. Received: ",
        ),
        ({"balance": "flop"}, "Did you mean 'flops'?"),
        (
            {"max_memory": -1},
            "`max_memory` must be a positive number of bytes, or None. Received: max_memory=-1.",
        ),
        ({"max_memory": "2GB"}, "`max_memory` must be a positive number of bytes"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1. Received: batch_size=0."),
        ({"slots": -1}, "`slots` must be an integer of at least 0. Received: slots=-1."),
        ({"crossing": float("nan")}, "`crossing` must be a number, at least 0. Received: crossing=nan."),
        ({"samples": [1]}, '`samples` must be left out unless balance="measured"'),
    ],
)
def test_wrong_settings(chain, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(chain(1, 2, 3), **{"places": 2, **settings})


def test_a_wrong_keyword(chain):
    with pytest.raises(TypeError, match=r"`hvd.plan` has no argument `pin`. Did you mean `pins`"):
        hvd.plan(chain(1, 2), 2, pin={})


def test_questions_without_an_answer(chain):
    found = plan(chain(1, 2, 3), 2)
    with pytest.raises(ValueError, match=r"`path` must be a layer of 'model'. Received: path='l9'."):
        found.place_of("l9")
    with pytest.raises(ValueError, match=r"`place` must lie in 0 to 1. Received: place=2."):
        found.layers_of(2)


def test_no_load_at_all(chain):
    assert [cost.share for cost in plan(chain(0, 0, 0), 3).costs] == [0.0, 0.0, 0.0]


def test_a_plan_that_is_none(chain):
    graph = chain(1, 2)
    with pytest.raises(ValueError, match=r"twice \['l0'\], not at all \['l1'\], unknown \['l7'\]"):
        Plan(graph, (("x", "l0"), ("l0", "l7")))
    with pytest.raises(ValueError, match=r"Each place must have a layer. Received: none at place 0"):
        Plan(graph, (("x",), ("l0", "l1")))
    with pytest.raises(ValueError, match=r"Inputs must be at place 0"):
        Plan(graph, (("l0",), ("l1", "x")))


def test_a_plan_for_another_model(chain):
    found = plan(chain(1, 2, 3), 2)
    found.check(chain(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"`plan` must be a plan for .*; only in the plan: 'l2'. Keras numbers"
    ):
        found.check(chain(1, 2))
    with pytest.raises(ValueError, match=r"only in the model: 'l3'"):
        found.check(chain(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"of another class or size: 'l1'"):
        found.check(chain(1, 5, 3))


def test_through_a_file(towers, looped, tmp_path):
    path = tmp_path / "plan.yaml"
    measured = dataclasses.replace(
        looped, layers=tuple(dataclasses.replace(layer, seconds=0.25) for layer in looped.layers), slots=1
    )
    for found in (
        plan(towers, 2, pins={"right/*": 0, "left/*": 1}, batch_size=7, crossing=0.5),
        plan(measured, 3, "measured", forward_only=False),
    ):
        found.save(path)
        loaded = Plan.load(path)
        assert loaded == found
        assert loaded.costs == found.costs
        assert pickle.loads(pickle.dumps(found)) == found


def test_a_file_is_edited(chain, tmp_path):
    path = tmp_path / "plan.yaml"
    plan(chain(1, 2, 3), 2).save(path)
    text = path.read_text()
    line = "  l1: {place: 0, kind: Dense, parameters: 2, weight_bytes: 8, trainable_bytes: 8, flops: 4}\n"
    assert line in text

    def edited(old, new):
        assert old in text
        path.write_text(text.replace(old, new))
        return Plan.load(path)

    moved = edited(line, line.replace("place: 0", "place: 1"))
    assert moved.stages == (("x", "l0"), ("l1", "l2"))
    assert [cost.parameters for cost in moved.costs] == [1, 5]
    for old, new, message in [
        ("l1: {place: 0", "l1: {place: 2", "layers.l1.place: `place` must lie in 0 to 1. Received: place=2."),
        (
            "l1: {place: 0",
            "l1: {place: up",
            "layers.l1.place: `place` must be a whole number. Received: place='up'",
        ),
        (
            "l1: {place: 0",
            "l1: {palce: 0",
            "layers.l1.palce: `layer` has no argument `palce`. Did you mean `place`?",
        ),
        ("l2: {place: 1", "l2: {place: 0", "Each place must have a layer. Received: none at place 1."),
        (line, "", "tensors.l0: 'l1' must be one of `layers`."),
        ("balance: parameters", "balance: flop", "balance: there is no 'flop'. Did you mean `flops`?"),
        ("places: 2", "", "`places` must be given."),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            edited(old, new)


def test_as_text(looped):
    assert plan(looped, 2, forward_only=False, crossing=0).table() == (
        "model: 4 layers at 2 places, balanced by parameters; memory for batches of 32 and 2 optimizer "
        "slots\n\n"
        "place  layers  parameters  weights  memory  flops  arriving   share  from  to\n"
        "    0       2           4     16 B   576 B      8      16 B  40.0 %  a     s\n"
        "    1       2           6     24 B   864 B     12      24 B  60.0 %  b     c\n"
        "\n"
        "crossing  places  per sample  dtype    shape\n"
        "s         0 -> 1        12 B  float32  (?, 3)\n"
        "b         1 -> 0        16 B  float32  (?, 4)\n"
        "s@1       0 -> 1        12 B  float32  (?, 3)"
    )


@pytest.mark.slow
def test_as_a_picture(looped, chain, tmp_path):
    for number, found in enumerate(
        [plan(looped, 3, forward_only=False), plan(chain(*range(80)), 5, "memory")]
    ):
        path = tmp_path / f"{number}.png"
        found.draw(path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(chain, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        plan(chain(1, 2), 2).draw(tmp_path / "plan.png")
