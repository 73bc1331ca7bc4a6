"""Do the ranks that share a layer see the same samples? Otherwise they train on a mixture, without a word.

Cut layers and losses note what they are given; every so often, with an update, the ranks compare. What is
compared is one number per input, near which the inputs of other samples do not come:

    f(x) = sum over i of x_i cos(i) / sqrt(sum over i of x_i^2)
"""

from __future__ import annotations

import threading

import tensorflow as tf

_NOTES = "hvdext_seen"  # a collection of the graph whose tensors they are
_thread = threading.local()


def note(name: str, tensor: tf.Tensor) -> None:
    """Remembers an input that must be the same on all ranks, until the next update.

    Args:
        name: whose input; eagerly the last one of each name counts.
        tensor: of any shape; integers or floating.
    """
    if tf.executing_eagerly():
        vars(_thread).setdefault("seen", {})[name] = fingerprint(tensor)
    else:
        tf.compat.v1.get_default_graph().add_to_collection(_NOTES, tensor)


def fingerprints() -> list[tf.Tensor]:
    """Those of all inputs noted since the last update, eagerly, or in the graph being built and around it."""
    if tf.executing_eagerly():
        return list(vars(_thread).pop("seen", {}).values())
    graph, tensors = tf.compat.v1.get_default_graph(), []
    while graph is not None:
        tensors += graph.get_collection(_NOTES)
        graph = getattr(graph, "outer_graph", None)
    return [fingerprint(tensor) for tensor in tensors]


def fingerprint(tensor: tf.Tensor) -> tf.Tensor:
    """F of a tensor, a float32 scalar; 0 where there is nothing but zeros."""
    x = tf.cast(tf.reshape(tensor, [-1]), tf.float32)
    weights = tf.cos(tf.cast(tf.range(tf.size(x)), tf.float32))
    return tf.math.divide_no_nan(tf.reduce_sum(x * weights), tf.norm(x))
