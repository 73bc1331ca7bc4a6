"""An optimizer that updates one variable after the other: less memory at the end of a batch.

An update makes several temporary tensors of its variable's size. TensorFlow begins all updates whose
gradients are there before it ends any of them, so that a stage, whose gradients are all complete at the same
time, would need several times the memory of its weights for a moment.
"""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.gradients.tensors import map_gradient


def update_in_turn(optimizer: keras.optimizers.Optimizer) -> None:
    """Makes `optimizer` begin an update when the one before has ended, in the order of its gradients."""
    plain = optimizer.update_step
    before: list = [None, []]  # the graph, and what the next update in it waits for

    def update_step(gradient, variable, learning_rate):
        if tf.executing_eagerly():
            plain(gradient, variable, learning_rate)
            return
        graph = tf.compat.v1.get_default_graph()
        if before[0] is not graph:
            before[:] = graph, []
        with tf.control_dependencies(before[1]):
            gradient = map_gradient(tf.identity, gradient)
        plain(gradient, variable, learning_rate)
        before[1] = [tf.convert_to_tensor(variable)]  # read after it has been assigned

    optimizer.update_step = update_step
