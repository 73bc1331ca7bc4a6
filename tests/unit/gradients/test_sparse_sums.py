"""Sparse matmuls and lookups: ranks as threads against plain Keras with the whole batch, every optimizer."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

ROWS, WIDTH = 12, 2
DATA = np.random.default_rng(0)
MULTI_HOT = (DATA.random((3, 8, ROWS)) < 0.3).astype("float32")  # three batches
IDS = DATA.integers(0, 5, (3, 8, 3)).astype("int32")  # few, so that rows repeat
SPARSE_IDS = DATA.integers(1, 5, (3, 8, 3)).astype("int64") * (DATA.random((3, 8, 3)) < 0.7)
WEIGHTS = DATA.normal(size=(ROWS, WIDTH)).astype("float32")

OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
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
    "clipnorm": lambda: keras.optimizers.Adam(0.1, clipnorm=0.1),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.1, global_clipnorm=0.1),
}
LIKE_SUMS = ["SGD", "momentum"]  # nothing but gathering and summing would tell these apart


def matmul(table, batch):
    return keras.ops.matmul(tf.sparse.from_dense(MULTI_HOT_(batch)), table)


def MULTI_HOT_(batch):
    return tf.gather(tf.constant(MULTI_HOT), batch[0])[batch[1] :: batch[2]]


def taken(array, batch):
    return tf.gather(tf.constant(array), batch[0])[batch[1] :: batch[2]]


def lookup(table, batch):
    return tf.reduce_sum(keras.ops.take(table, taken(IDS, batch), 0), 1)


def sparse_lookup(table, batch):
    found = keras.ops.take(table, tf.sparse.from_dense(taken(SPARSE_IDS, batch)), 0)
    return tf.reduce_sum(found, 1)


def both(table, batch):
    """A matmul, a plain lookup and a sparse one share a table."""
    return matmul(table, batch) * (1 + lookup(table, batch)) + sparse_lookup(table, batch)


def twice(table, batch):
    return matmul(table, batch) + 0.5 * matmul(2 * table, (batch[0], batch[1], batch[2]))


FORMS = {"matmul": matmul, "lookup": lookup, "sparse lookup": sparse_lookup, "both": both}


def train(form, optimizer, rank, ranks, steps, in_graph=True, passes=1):
    """The table after `steps` batches, of each of which this rank takes every `ranks`-th row."""
    table = tf.Variable(WEIGHTS)
    optimizer.build([table])

    def step(number, part):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((FORMS[form](table, (number, part, ranks * passes)) - 1) ** 2)
        gradient = tape.gradient(loss, table)
        assert isinstance(gradient, tf.IndexedSlices)
        optimizer.apply([gradient], [table])

    run = tf.function(step) if in_graph else step
    for number in range(steps):
        for part in range(rank, ranks * passes, ranks):
            run(tf.constant(number), tf.constant(part) if in_graph else part)
    return table.numpy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_one_process_would(name):
    def distributed(comm):
        return {
            form: train(form, hvd.DistributedOptimizer(OPTIMIZERS[name]()), comm.rank, 2, 2) for form in FORMS
        }

    for got in run_ranks(2, distributed):
        for form in FORMS:
            expected = train(form, OPTIMIZERS[name](), 0, 1, 2)
            np.testing.assert_allclose(got[form], expected, atol=2e-5, err_msg=form)
