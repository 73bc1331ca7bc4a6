"""Can a stage's forward pass be made twice, with the same result? `recompute` needs it.

The second pass begins with the values that Keras' variables had before the first one, the states of random
generators among them. What TensorFlow draws or keeps by itself goes on from pass to pass: gradients would
belong to another loss than the one that was told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import raise_on_all
from hvdext.placement.pipeline.stages import Stage

# Those of tf.random.*, and those that read and move the state of a tf.random.Generator.
_DRAW = frozenset(
    {
        "Multinomial",
        "NonDeterministicInts",
        "ParameterizedTruncatedNormal",
        "RandomGamma",
        "RandomPoisson",
        "RandomPoissonV2",
        "RandomShuffle",
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "RngReadAndSkip",
        "RngSkip",
        "StatefulRandomBinomial",
        "StatefulStandardNormal",
        "StatefulStandardNormalV2",
        "StatefulTruncatedNormal",
        "StatefulUniform",
        "StatefulUniformFullInt",
        "StatefulUniformInt",
        "TruncatedNormal",
    }
)
_ASSIGN = frozenset({"AssignAddVariableOp", "AssignSubVariableOp", "AssignVariableOp"})


def require_repeatable(comm: Communicator, stages: Sequence[Stage]) -> None:
    """Refuses stages whose second forward pass would differ from the first. All of `comm` call it.

    Args:
        comm: the pipeline's ranks.
        stages: this rank's.

    Raises:
        ValueError: on every rank alike, if a stage of any of them draws random numbers, or keeps state, where
            Keras does not know of it.
    """
    found = [words for stage in stages for words in _found_in(stage)]
    error = None
    if found:
        error = ValueError(
            "`recompute` must be False where layers draw or keep what a second pass would not find as "
            "it was: draw by keras.random with a keras.random.SeedGenerator of the layer's, keep state in "
            f"`add_weight`. Received: recompute=True, and {', '.join(dict.fromkeys(found))}."
        )
    raise_on_all(comm, error, "hvd.pipeline cannot recompute", "hvdext.placement.repeatable")


def _found_in(stage: Stage) -> list[str]:
    specs = [tf.TensorSpec(parcel.spec.shape, parcel.spec.dtype) for parcel in stage.chunk.takes]
    try:
        traced = tf.function(lambda *tensors: stage(list(tensors), training=True), autograph=False)
        graph = traced.get_concrete_function(*specs).graph
    except Exception:  # what is wrong with it, training says
        return []
    known = {id(variable.value.handle) for variable in stage.variables}
    unknown = {id(inside) for outside, inside in graph.captures if id(outside) not in known}
    functions = {one.signature.name: one for one in graph.as_graph_def().library.function}
    found = []
    for operation in graph.get_operations():
        kinds = set(_kinds(operation.node_def, functions, set()))
        drawn = sorted(kinds & _DRAW)
        if drawn:
            found.append(f"{drawn[0]} in layer {_layer_of(operation, stage)!r}")
        elif kinds & _ASSIGN and any(id(taken) in unknown for taken in operation.inputs):
            found.append(f"a variable that is no weight in layer {_layer_of(operation, stage)!r}")
    return found


def _layer_of(operation, stage: Stage) -> str:
    """The path of the layer that an operation is in; its own name where that cannot be told."""
    scopes = [re.sub(r"_\d+$", "", part) for part in operation.name.split("/")]
    scopes += operation.name.split("/")
    paths = dict.fromkeys(call.path for call in stage.chunk.calls)
    return next((path for path in paths if path.split("/")[-1] in scopes), operation.name)


def _kinds(node, functions, seen: set[str]) -> Iterator[str]:
    """The kinds of an operation, and of those in the functions that it calls."""
    yield node.op
    called = [node.op]
    for attribute in node.attr.values():
        called += [one.name for one in (attribute.func, *attribute.list.func) if one.name]
    for name in called:
        if name in functions and name not in seen:
            seen.add(name)
            for inner in functions[name].node_def:
                yield from _kinds(inner, functions, seen)
