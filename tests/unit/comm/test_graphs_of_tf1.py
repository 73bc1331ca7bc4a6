"""Collectives in graphs of TensorFlow 1, which hold no eager variables: without marks in the ledger."""

import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks


def test_sums_and_rows_meet_in_sessions():
    def program(comm):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            mine = tf.constant([comm.rank + 1.0])
            swapped = hvd.alltoall(tf.tile(mine, [2]))
            asked = [hvd.allreduce(mine, op=hvd.Sum), hvd.allgather(mine), hvd.broadcast(mine, 1), swapped]
            found = session.run(asked)
        return [value.tolist() for value in found], comm.traffic()

    expected = [[3.0], [1.0, 2.0], [2.0], [1.0, 2.0]]
    assert run_ranks(2, program) == [(expected, {})] * 2


def test_the_gradient_of_a_broadcast_meets_on_ranks_that_get_nothing():
    def program(comm):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            mine = tf.constant([comm.rank + 1.0])
            return session.run(tf.gradients(hvd.broadcast(mine, 1) * (comm.rank + 1.0), mine))[0].tolist()

    assert run_ranks(2, program) == [[0.0], [1.5]]


@pytest.mark.parametrize("call", [hvd.broadcast_variables, hvd.broadcast_])
def test_variables_are_refused(call):
    variable = tf.Variable(np.ones(1))

    def program(comm):
        with tf.Graph().as_default(), pytest.raises(RuntimeError, match=r"eagerly or in a `tf\.function`"):
            call([variable], 0)

    run_ranks(2, program)
