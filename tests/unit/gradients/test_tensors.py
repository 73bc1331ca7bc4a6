"""Gradients come as whatever Keras takes: tensors, arrays, slices made of lists or tuples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

INDICES = {"tuple": (0, 2), "list": [0, 2], "array": np.array([0, 2]), "tensor": tf.constant([0, 2])}
ROWS = np.array([[1.0, 2.0], [3.0, 4.0]], "float32")


@pytest.mark.parametrize("values", [ROWS, tf.constant(ROWS)], ids=["array", "tensor"])
@pytest.mark.parametrize("indices", INDICES)
def test_slices_of_anything(indices, values):
    def run(comm):
        variable = keras.Variable(np.ones((3, 2), "float32"))
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        optimizer.apply([tf.IndexedSlices(values, INDICES[indices], (3, 2))], [variable])
        return variable.numpy()

    expected = [[0.0, -1.0], [1.0, 1.0], [-2.0, -3.0]]  # the mean of two equal ranks
    for size in (1, 2):
        for mine in run_ranks(size, run):
            np.testing.assert_array_equal(mine, expected)


def test_an_array():
    def run(comm):
        variable = keras.Variable([1.0, 1.0])
        hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)).apply(
            [np.full(2, comm.rank, "float32")], [variable]
        )
        return variable.numpy().tolist()

    assert run_ranks(2, run) == [[0.5, 0.5]] * 2
