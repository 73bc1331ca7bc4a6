"""What decides the order of a `tf.data.Dataset`'s elements, read off the data sets that it is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

_HINT = {
    "ShuffleDataset": "shuffle() without a seed: write shuffle(..., seed=0), or list_files(..., seed=0)",
    "RandomDataset": "random numbers without a seed: pass seed=0 to Dataset.random or sample_from_datasets",
    "filter": "filter() by random numbers without a seed: pass seed=0 to tf.random",
    "deterministic": "an order that depends on who is first: write deterministic=True instead of False",
}
_IGNORE = tf.data.experimental.ExternalStatePolicy.IGNORE  # such as how far a generator is
_DECIDING = ("_seed", "_seed2", "_tensors", "_filenames", "_start", "_stop", "_step")


@dataclasses.dataclass
class OrderOf:
    """What is known of it.

    Attributes:
        undecided: what draws another order in each process, as sentences for the user.
        values: the numbers and words that the order or the elements follow from, by what they are.
        is_hidden: whether elements come out of Python code.
        is_redrawn: whether each pass has another order, which depends on how many passes there were.
    """

    undecided: list[str] = dataclasses.field(default_factory=list)
    values: list[tuple[str, np.ndarray]] = dataclasses.field(default_factory=list)
    is_hidden: bool = False
    is_redrawn: bool = False


def order_of(dataset: tf.data.Dataset) -> OrderOf:
    """Looks into a data set without drawing an element."""
    found = OrderOf()
    for part in inputs_of(dataset):
        kind = type(part).__name__.strip("_")
        held = {name: getattr(part, name) for name in _DECIDING if hasattr(part, name)}
        if "_seed" in held and not _values(held["_seed"]) and not _values(held["_seed2"]):
            found.undecided += [hint for op, hint in _HINT.items() if kind.startswith(op)]
        if getattr(part, "_deterministic", None) == "false" or (
            kind == "ParallelInterleaveDataset" and _races(_serialized(part))
        ):
            found.undecided.append(_HINT["deterministic"])
        found.is_redrawn |= bool(getattr(part, "_reshuffle_each_iteration", False))
        found.values += [(f"{kind}.{name.strip('_')}", value) for name, value in _arrays(held)]
        for function in part._functions():
            _look_into(found, kind, function.function.graph.as_graph_def())
    found.undecided = list(dict.fromkeys(found.undecided))
    return found


def inputs_of(dataset: tf.data.Dataset) -> Iterator[tf.data.Dataset]:
    """A data set and all that it is made of, but for those within functions."""
    yield dataset
    for part in dataset._inputs():
        yield from inputs_of(part)


def _look_into(found, kind, graph):
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        by_name = {node.name: node for node in nodes}
        for node in nodes:
            if node.op in ("PyFunc", "EagerPyFunc", "PyFuncStateless"):
                found.is_hidden |= kind in ("FlatMapDataset", "GeneratorDataset") or "Interleave" in kind
            elif node.op.startswith(("ShuffleDataset", "ShuffleAndRepeatDataset")):
                found.undecided += _unless_seeded(node, by_name, "ShuffleDataset", first=2)
            elif node.op.startswith("RandomDataset"):
                found.undecided += _unless_seeded(node, by_name, "RandomDataset", first=0)
            elif "Filter" in kind and _is_random(node):
                found.undecided.append(_HINT["filter"])
            elif node.op.startswith("Parallel") and _races_at(node):
                found.undecided.append(_HINT["deterministic"])


def _unless_seeded(node, by_name, what, first):
    seeds = [by_name.get(name.split(":")[0].lstrip("^")) for name in node.input[first : first + 2]]
    if any(seed is None or seed.op != "Const" for seed in seeds):
        return []  # worked out when it runs
    values = [int(tf.make_ndarray(seed.attr["value"].tensor)) for seed in seeds]
    return [] if any(values) else [_HINT[what]]


def _is_random(node):
    if "seed" not in node.attr or "seed2" not in node.attr:
        return False
    return not node.attr["seed"].i and not node.attr["seed2"].i


def _races(graph):
    return graph is not None and any(_races_at(node) for node in graph.node)


def _races_at(node):
    return "deterministic" in node.attr and node.attr["deterministic"].s == b"false"


def _serialized(dataset):
    try:
        text = dataset._as_serialized_graph(
            external_state_policy=tf.data.experimental.ExternalStatePolicy.IGNORE
        )
    except tf.errors.OpError:  # it holds what cannot be written
        return None
    return tf.compat.v1.GraphDef.FromString(text.numpy())


def _values(tensor):
    return int(tensor.numpy()) if tf.is_tensor(tensor) and hasattr(tensor, "numpy") else int(tensor or 0)


def _arrays(held: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """What is known already: eager tensors and numbers."""
    for name, value in held.items():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if tf.is_tensor(part) and hasattr(part, "numpy") and part.dtype not in (tf.variant, tf.resource):
                yield name, part.numpy()
