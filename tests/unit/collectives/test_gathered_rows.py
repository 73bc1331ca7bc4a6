"""The gradient of `hvd.allgather`: a loss over the rows of all ranks, against one process."""

import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

RANKS, ROWS = 2, 3
X = np.random.default_rng(0).normal(size=(RANKS * ROWS, 4))
W = np.random.default_rng(1).normal(size=(4, 2))


def contrastive(rows, columns, first):
    """Every row is to be nearest to its own column."""
    scores = tf.matmul(rows, columns, transpose_b=True)
    mine = first + tf.range(tf.shape(rows)[0])
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(mine, scores))


def gradient_in_one_process():
    w = tf.Variable(W)
    with tf.GradientTape() as tape:
        z = tf.matmul(tf.constant(X), w)
        loss = contrastive(z, z, 0)
    return tape.gradient(loss, w).numpy()


def averaged(gather):
    def one_rank(comm):
        w = tf.Variable(W)
        with tf.GradientTape() as tape:
            z = tf.matmul(tf.constant(X[comm.rank * ROWS :][:ROWS]), w)
            loss = contrastive(z, gather(z), comm.rank * ROWS)
        return comm.allreduce([tape.gradient(loss, w)], "hvdext.test.mean", postscale=1 / comm.size)[
            0
        ].numpy()

    return run_ranks(RANKS, one_rank)


@pytest.mark.parametrize(
    "gather",
    [
        lambda z: hvd.allgather(z, gradient="sum"),
        lambda z: hvd.grouped_allgather([z, 2 * z], gradient="sum")[0],
    ],
)
def test_the_sum_is_that_of_one_process(gather):
    for gradient in averaged(gather):
        np.testing.assert_allclose(gradient, gradient_in_one_process(), rtol=1e-12)


def test_the_mean_is_horovods_and_says_so():
    with pytest.warns(UserWarning, match='pass gradient="sum" to hvd.allgather'):
        untold = averaged(hvd.allgather)
    told = averaged(lambda z: hvd.allgather(z, gradient="mean"))
    np.testing.assert_array_equal(untold, told)
    assert np.abs(told[0] - gradient_in_one_process()).max() > 1e-3


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="`gradient` must be one of None, 'mean', 'sum'"):
        run_ranks(1, lambda comm: hvd.allgather([1.0], gradient="average"))
