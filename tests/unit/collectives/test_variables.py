"""`hvd.broadcast_variables`: eagerly and within functions, and what ranks that differ are told."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks


def test_it_takes_place_in_each_run_of_a_function():
    def program(comm):
        plain = tf.Variable([1.0 + comm.rank, 10.0 * comm.rank])
        ours = keras.Variable(np.full((2, 1), comm.rank + 3), dtype="int32")

        @tf.function
        def step(first):
            plain.assign_add([1.0, 1.0])
            if first:
                hvd.broadcast_variables([plain], root_rank=1)
                hvd.broadcast_variables([ours], root_rank=0)
            return plain * 2.0

        seen = [step(True).numpy().tolist()]
        plain.assign([5.0 * comm.rank, 0.0])
        seen += [step(False).numpy().tolist(), step(True).numpy().tolist()]
        return seen, ours.numpy().tolist()

    first, second = run_ranks(2, program)
    # By hand: 1 is added before rank 1's values count, and what follows in the function sees them.
    assert first == ([[6.0, 22.0], [2.0, 2.0], [14.0, 4.0]], [[3], [3]])
    assert second == ([[6.0, 22.0], [12.0, 2.0], [14.0, 4.0]], [[3], [3]])


def test_one_rank_may_trace_its_function_again():
    def program(comm):
        variable = tf.Variable(float(comm.rank))

        @tf.function
        def step(batch):
            hvd.broadcast_variables([variable], 1)
            return tf.reduce_sum(batch) + variable

        return [step(tf.ones(2)).numpy(), step(tf.ones(2 + comm.rank)).numpy()]

    assert run_ranks(2, program) == [[3.0, 3.0], [3.0, 4.0]]


@pytest.mark.parametrize("in_function", [False, True])
def test_all_ranks_are_told_which_variable_differs(in_function):
    def program(comm):
        variables = [tf.Variable(1.0), tf.Variable(tf.zeros(3 + comm.rank))]
        call = lambda: hvd.broadcast_variables(variables, 0)  # noqa: E731
        with pytest.raises(tf.errors.InvalidArgumentError) as told:
            (tf.function(call) if in_function else call)()
        return str(told.value)

    for text in run_ranks(2, program):
        assert "variable 1: rank 0: '(3,) float32'; rank 1: '(4,) float32'" in text
        assert "variable 0" not in text


def test_a_mistake_of_one_rank_is_told_to_the_others():
    def program(comm):
        wrong = [1.0] if comm.rank else [tf.Variable(1.0)]
        with pytest.raises(ValueError, match="`variables` must hold Keras or TensorFlow variables"):
            hvd.broadcast_variables(wrong, 0)
        with pytest.raises(ValueError, match=r"`root_rank` must be one of the ranks \[0, 1\]"):
            hvd.broadcast_variables([tf.Variable(1.0)], 7 * comm.rank)

    run_ranks(2, program)
