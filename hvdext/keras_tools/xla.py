"""What XLA compiles, and what it cannot: collectives."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf
from tensorflow.python.ops import control_flow_util, resource_variable_ops

_STANDS = "must not stand in a function that XLA compiles"


def refuse_xla(name: str) -> None:
    """Refuses a graph that XLA is going to compile.

    Args:
        name: of the collective that stands in it.

    Raises:
        RuntimeError: while such a graph is traced.
    """
    graph = tf.compat.v1.get_default_graph()
    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise RuntimeError(  # no class of its own, which AutoGraph would not keep
            f"A collective ({name}) {_STANDS}, "
            "`tf.function(jit_compile=True)`: XLA cannot compile what ranks exchange. Compile the functions "
            "that compute, and call them and the collective in one that is not compiled; model.fit does so "
            "by itself."
        )


def refused(error: Exception) -> str | None:
    """The collective that `refuse_xla` has refused with this error; None if it was another."""
    found = re.search(rf"A collective \((\S+)\) {_STANDS}", str(error))
    return found and found[1]


@contextlib.contextmanager
def compiled_by_hand(model: keras.Model) -> Iterator[None]:
    """Context in which Keras makes functions of a model's steps that XLA does not compile."""
    before = model.jit_compile
    model.jit_compile = False
    try:
        yield
    finally:
        model.jit_compile = before


@contextlib.contextmanager
def with_lasting_variables() -> Iterator[None]:
    """Context in which what is traced makes variables outside of its function.

    Those made within lose their first values if the trace fails.
    """

    def make(make_within, **settings):
        first = settings.get("initial_value")
        if not callable(first) and tf.is_tensor(first) and not hasattr(first, "numpy"):
            return make_within(**settings)  # of a tensor of the function
        with tf.init_scope():
            return resource_variable_ops.ResourceVariable(**settings)  # asks no scope such as this one

    with tf.variable_creator_scope(make):
        yield


def compiled(function: Callable) -> Callable:
    """`function` of tensors, compiled by XLA, also where it stands in a graph that is not."""
    return tf.function(function, jit_compile=True, autograph=False)


def uses(operations: Sequence[tf.Operation], graph: tf.Graph, variables: Sequence) -> bool:
    """Whether any of `operations`, of the graph of a `tf.function`, reads or writes any of `variables`.

    Args:
        operations: some of the graph's.
        graph: of the function.
        variables: Keras' or TensorFlow's.
    """
    handles = {id(variable.handle) for variable in variables}
    inside = {id(inner) for outer, inner in graph.captures if id(outer) in handles}
    return any(id(tensor) in inside for operation in operations for tensor in operation.inputs)
