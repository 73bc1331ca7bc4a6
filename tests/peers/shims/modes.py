"""Tests in a graph and eagerly, as two; and what Horovod's ask privately, asked of hvdext and Keras 3."""

import functools

import tensorflow as tf

from hvdext.gradients.apply_hook import hook_of

GRAPH = "__in_a_graph"


def micro_batches(optimizer):
    """How many micro-batches of a cycle have been added up."""
    return hook_of(optimizer).accumulator._count.numpy()


def plain_gradients(loss, var_list):
    """Pairs (gradient, variable), as they go into `apply_gradients`."""
    with tf.GradientTape() as tape:
        value = loss()
    return list(zip(tape.gradient(value, var_list), var_list, strict=True))


def in_both_modes(cls):
    """Like TensorFlow's `run_all_in_graph_and_eager_modes`, so that neither mode hides the other.

    Adds to a class of tests, for each test, one that runs it in a graph with a session."""
    for name in [name for name in dir(cls) if name.startswith("test_") and name != "test_session"]:
        setattr(cls, name + GRAPH, _in_a_graph(getattr(cls, name)))


def _in_a_graph(test):
    @functools.wraps(test)
    def run(self):
        with tf.Graph().as_default(), self.test_session():
            test(self)

    return run
