"""The programs of the real ranks, with threads as ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import ThreadComm, run_ranks
from tests.multiprocess.programs import (
    count_programs,
    exchange_programs,
    overflow_programs,
    refusal_programs,
)

PROGRAMS = (
    exchange_programs.PROGRAMS
    | count_programs.PROGRAMS
    | overflow_programs.PROGRAMS
    | refusal_programs.PROGRAMS
)
# Real ranks come in twos and fours, so threads come in threes where they can.
PAIRS = [(3 if 3 in program.sizes else program.sizes[-1], name) for name, program in PROGRAMS.items()]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(("size", "name"), PAIRS)
@pytest.mark.slow
def test_program(size, name):
    program = PROGRAMS[name]
    program.check(run_ranks(size, lambda comm: program.run(hvd), timeout=30))


def _grad_collectives(monkeypatch, make_layers):
    """The names of rank 0's gradient collectives, as they enter the graph of a traced step."""
    names = []

    def record(method):
        plain = getattr(ThreadComm, method)

        def call(self, value, name, *arguments):
            if self.rank == 0 and name.startswith("hvdext.grad.") and not tf.executing_eagerly():
                names.append(name)
            return plain(self, value, name, *arguments)

        monkeypatch.setattr(ThreadComm, method, call)

    record("_allreduce")
    record("_allgather")

    def run(comm):
        model = keras.Sequential([keras.Input((2,), dtype="int32"), *make_layers()])
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name="sgd"))
        optimizer.build(model.trainable_variables)
        model.set_weights([np.ones_like(w) for w in model.get_weights()])

        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(model(x))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        step(tf.constant([[0, 1]]))

    run_ranks(2, run)
    # Once: the ledger's variables are not the function's own, which would be traced a second time for them.
    assert len(set(names)) == len(names)
    return names


def _embedding():
    return [keras.layers.Embedding(5, 3), keras.layers.Flatten()]


def _dense():
    return [keras.layers.Dense(4), keras.layers.Dense(1)]


@pytest.mark.slow
def test_dense_layers_after_an_embedding_are_exchanged_before_it(monkeypatch):
    """Backward has them first, and TensorFlow keeps the order in which collectives are written."""
    assert _grad_collectives(monkeypatch, lambda: [*_embedding(), *_dense()]) == [
        "hvdext.grad.sgd.0",
        "hvdext.grad.sgd.sparse0.values",
        "hvdext.grad.sgd.sparse0.indices",
    ]


def test_slices_are_gathered_once_a_bucket_has_told_whose_there_are(monkeypatch):
    """Also where the bucket waits for the first layer."""

    class Both(keras.layers.Layer):
        """Its weights lie around those of the embedding."""

        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(3, use_bias=False)
            self.words = keras.layers.Embedding(5, 3)

        def build(self, shape):
            self.first.build((None, 2))
            self.words.build(shape)

        def call(self, x):
            return self.first(keras.ops.cast(x, "float32")) + keras.ops.mean(self.words(x), axis=1)

    assert _grad_collectives(monkeypatch, lambda: [Both(), *_dense()]) == [
        "hvdext.grad.sgd.0",
        "hvdext.grad.sgd.sparse1.values",
        "hvdext.grad.sgd.sparse1.indices",
    ]
