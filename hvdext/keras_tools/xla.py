"""XLA cannot compile the engine's collectives: what is said about it."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.python.ops import control_flow_util


def refuse_xla(what: str) -> None:
    """Refuses a graph that XLA is going to compile.

    Args:
        what: what holds collectives, with an article.

    Raises:
        RuntimeError: while such a graph is traced.
    """
    graph = tf.compat.v1.get_default_graph()
    if not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(graph):
        raise RuntimeError(
            f"`jit_compile` must be False with {what}: XLA cannot compile the engine's collectives. "
            "Received: a training step that XLA compiles (`jit_compile=True`, or Keras' 'auto' on a GPU); "
            "pass `model.compile(..., jit_compile=False)`."
        )
