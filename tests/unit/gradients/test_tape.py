"""What `hvd.DistributedGradientTape` takes: all that the tape of TensorFlow takes, and Horovod's."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.gradients.exchange import GradientExchange
from hvdext.gradients.options import ExchangeOptions
from hvdext.testing import run_ranks


@pytest.mark.parametrize("in_function", [False, True])
def test_watched_tensors(in_function):
    def program(comm):
        weight = tf.Variable(3.0)

        def gradients(x):
            with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
                tape.watch(x)
                loss = weight * tf.reduce_sum(x**2)
            return tape.gradient(loss, [x, weight])

        function = tf.function(gradients, reduce_retracing=True) if in_function else gradients
        first = function(tf.constant([1.0, 2.0]) + comm.rank)
        second = function(tf.constant([[1.0]]) * (comm.rank + 1))
        return [value.numpy().tolist() for value in (*first, *second)]

    # By hand: the means over the ranks of 6x and of the sum of x^2.
    expected = [[9.0, 15.0], (5 + 13) / 2, [[9.0]], (1 + 4) / 2]
    assert run_ranks(2, program) == [expected] * 2


def test_tensors_of_other_shapes_are_refused_on_all_ranks():
    def program(comm):
        def gradient(shape):
            x = tf.ones(shape)
            with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
                tape.watch(x)
                loss = tf.reduce_sum(x)
            return tape.gradient(loss, x)

        with pytest.raises(ValueError, match=r"variable 0: rank 0: '\(tensor\) \(2,\) float32"):
            gradient([2 + comm.rank])
        assert gradient([2, 3]).shape == (2, 3)

    run_ranks(2, program)


def test_the_shapes_of_tensors_are_part_of_what_each_message_says(monkeypatch):
    """The engine adds up flat messages: later shapes of one size would meet without a word."""
    told = []
    monkeypatch.setattr("hvdext.gradients.exchange.Pattern", lambda facts, words: told.append(facts))
    exchange = GradientExchange("tape", ExchangeOptions())
    for x in (tf.ones([2, 3]), tf.ones([3, 2]), tf.Variable(tf.ones([2, 3]))):
        exchange._pattern([x], [x], [True], [[0]], ())
    assert told[0] != told[1]
    assert len({repr(facts) for facts in told}) == 3


def test_structures_and_what_is_unconnected():
    def program(comm):
        a, b, other = tf.Variable(2.0), keras.Variable(3.0), tf.Variable([1.0, 1.0])
        with hvd.DistributedGradientTape(tf.GradientTape(persistent=True)) as tape:
            loss = (comm.rank + 1) * a * a * b.value
        nested = tape.gradient(loss, {"x": (a, [b]), "none": other})
        zeros = tape.gradient(loss, [other], unconnected_gradients="zero")
        twice = tape.gradient(loss, a, output_gradients=tf.constant(2.0), use_generic_names=True)
        own = tape.jacobian(loss, a)
        assert nested["none"] is None
        return [v.numpy().tolist() for v in (nested["x"][0], nested["x"][1][0], zeros[0], twice, own)]

    # By hand: 2ab and a^2 times the mean of 1 and 2; a Jacobian is this rank's own.
    for rank, found in enumerate(run_ranks(2, program)):
        assert found == [18.0, 6.0, [0.0, 0.0], 36.0, 12.0 * (rank + 1)]


def test_local_and_combined_gradients():
    def program(comm):
        own, all_of_us = (keras.layers.Dense(1, use_bias=False, kernel_initializer="ones") for _ in "12")
        x = np.full((1, 1), comm.rank + 1.0, "float32")
        with tf.GradientTape() as recording:
            loss = tf.reduce_sum(own(x)) + tf.reduce_sum(all_of_us(x))
        tape = hvd.PartialDistributedGradientTape(recording, local_layers=[own])
        local, combined = tape.get_local_and_global_gradients(loss, [own.kernel, all_of_us.kernel])
        ((mine, at_home),), ((ours, met),) = local, combined
        assert mine is own.kernel
        assert ours is all_of_us.kernel
        return at_home.numpy()[0, 0], met.numpy()[0, 0]

    assert run_ranks(2, program) == [(0.5, 1.5), (1.0, 1.5)]


def test_refusals():
    with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
        loss = tf.ragged.constant([[1.0]])
    with pytest.raises(TypeError, match="`sources` must be variables or tensors"):
        run_ranks(1, lambda comm: tape.gradient(loss.values, [loss]))
