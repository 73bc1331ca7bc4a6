"""Slices of sparse matmuls and lookups: ranks as threads against plain Keras with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.gradients.sums import added_up, marked
from hvdext.testing import run_ranks

ROWS, WIDTH, BATCHES = 12, 2, 2
DATA = np.random.default_rng(0)
MULTI_HOT = tf.constant((DATA.random((BATCHES, 8, ROWS)) < 0.3).astype("float32"))
IDS = tf.constant(DATA.integers(0, 5, (BATCHES, 8, 3)))  # few, so that rows repeat
FILLED = tf.constant(DATA.integers(1, 5, (BATCHES, 8, 3)) * (DATA.random((BATCHES, 8, 3)) < 0.7))
TABLE = DATA.normal(size=(ROWS, WIDTH)).astype("float32")


def matmul(table, batch, part):
    return keras.ops.matmul(tf.sparse.from_dense(MULTI_HOT[batch][part]), table)


def lookup(table, batch, part):
    return tf.reduce_sum(keras.ops.take(table, IDS[batch][part], 0), 1)


def sparse_lookup(table, batch, part):
    return tf.reduce_sum(keras.ops.take(table, tf.sparse.from_dense(FILLED[batch][part]), 0), 1)


def shared(table, batch, part):
    """Two matmuls, a plain lookup and a sparse one have a table in common."""
    product = matmul(table, batch, part) * (1 + lookup(table, batch, part))
    return product + sparse_lookup(table, batch, part) + matmul(table, 1 - batch, part)


FORMS = [matmul, lookup, sparse_lookup, shared]


def train(optimizer, rank, ranks, forms=FORMS, in_graph=True, passes=1):
    """The tables, one per form, after all batches; this rank takes each `ranks`-th row."""
    tables = [tf.Variable(TABLE, name=form.__name__) for form in forms]
    optimizer.build(tables)

    def step(batch, first):
        part = slice(first, None, ranks * passes)
        with tf.GradientTape() as tape:
            outputs = [form(table, batch, part) for form, table in zip(forms, tables, strict=True)]
            losses = [tf.reduce_mean((output - 1) ** 2) for output in outputs]
        gradients = tape.gradient(losses, tables)
        assert all(isinstance(gradient, tf.IndexedSlices) for gradient in gradients)
        optimizer.apply(gradients, tables)

    one_step = tf.function(step, autograph=False) if in_graph else step
    for batch in range(BATCHES):
        for first in range(rank, ranks * passes, ranks):
            one_step(tf.constant(batch), tf.constant(first))
    return [table.numpy() for table in tables]


OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.1, amsgrad=True),
    "AdamW": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "Adamax": lambda: keras.optimizers.Adamax(0.1),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "Lamb": lambda: keras.optimizers.Lamb(0.1),
    "Lion": lambda: keras.optimizers.Lion(0.1),
    "Nadam": lambda: keras.optimizers.Nadam(0.1),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.1, momentum=0.9, centered=True),
    "SGD": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "SGD that clips": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
}
SAMPLE = ["Ftrl"]


def _param(name):
    return pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)


@pytest.mark.parametrize("name", [_param(name) for name in OPTIMIZERS])
def test_optimizers_train_as_in_one_process(name):
    make = OPTIMIZERS[name]
    expected = train(make(), 0, 1)
    for got in run_ranks(2, lambda comm: train(hvd.DistributedOptimizer(make()), comm.rank, 2)):
        for form, table, right in zip(FORMS, got, expected, strict=True):
            np.testing.assert_allclose(table, right, atol=2e-5, err_msg=form.__name__)


def test_eagerly():
    forms = FORMS[:3]
    make = OPTIMIZERS["Adam"]
    expected = train(make(), 0, 1, forms)
    for got in run_ranks(
        2, lambda comm: train(hvd.DistributedOptimizer(make()), comm.rank, 2, forms, in_graph=False)
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_are_one_batch(ranks):
    make = OPTIMIZERS["Adam"]

    def one_rank(comm):
        optimizer = hvd.DistributedOptimizer(
            make(), backward_passes_per_step=2, average_aggregated_gradients=True
        )
        return train(optimizer, comm.rank, ranks, passes=2)

    expected = train(make(), 0, 1)
    for got in run_ranks(ranks, one_rank):
        for form, table, right in zip(FORMS, got, expected, strict=True):
            np.testing.assert_allclose(table, right, atol=1e-5, err_msg=form.__name__)


def test_a_tape_adds_up_what_meets_and_gathers_the_rest():
    def one_rank(comm):
        product, looked_up = tf.Variable(TABLE, name="product"), tf.Variable(TABLE, name="looked_up")

        @tf.function
        def gradients(indices):
            with hvd.DistributedGradientTape(tf.GradientTape(), op=hvd.Sum) as tape:
                ones = tf.sparse.from_dense(tf.one_hot(indices, ROWS))
                loss = tf.reduce_sum(keras.ops.matmul(ones, product)) + tf.reduce_sum(
                    tf.gather(looked_up, indices)
                )
            return tape.gradient(loss, [product, looked_up])

        return gradients(tf.constant([3, 3, 5 + comm.rank]))

    for summed, gathered in run_ranks(2, one_rank):
        assert sorted(zip(summed.indices.numpy(), summed.values.numpy()[:, 0], strict=True)) == [
            (3, 4.0),
            (5, 1.0),
            (6, 1.0),
        ]
        assert sorted(gathered.indices.numpy()) == [3, 3, 3, 3, 5, 6]


@pytest.mark.slow
def test_summed_densely_the_marks_are_gone():
    make = OPTIMIZERS["Adam"]
    forms = [matmul, sparse_lookup]
    expected = train(make(), 0, 1, forms)
    for got in run_ranks(
        2, lambda comm: train(hvd.DistributedOptimizer(make(), sparse_as_dense=True), comm.rank, 2, forms)
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_indices_behind_a_function_s_border():
    """The layer is a `tf.function` of its own, whose backward pass is another."""
    table = tf.Variable(TABLE)

    @tf.function
    def gradient():
        inner = tf.function(lambda: tf.reduce_sum(matmul(table, 0, slice(0, 4)) ** 2), autograph=False)
        with tf.GradientTape() as tape:
            loss = inner()
        slices = tape.gradient(loss, table)
        return slices.indices, marked([slices], [table])[0]

    indices, slices = gradient()
    np.testing.assert_array_equal(slices.indices, indices + ROWS)
    np.testing.assert_array_equal(added_up(slices, table).indices, indices)
