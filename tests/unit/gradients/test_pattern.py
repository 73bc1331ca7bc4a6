"""Which gradients there are may change from step to step, on all ranks alike: otherwise none is applied."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

ONES = np.ones((4, 8), "float32")
DISAGREE = "The ranks disagree about which gradients"
OPTIONS = {
    "average": {},
    "sum": {"op": hvd.Sum},
    "adasum": {"op": hvd.Adasum},
    "fp16": {"compression": hvd.Compression.fp16},
    "predivided": {"gradient_predivide_factor": 3.0},
    "a message each": {"groups": 4},
}


def _heads():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, [keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")])
    model.set_weights([np.ones_like(w) for w in model.get_weights()])
    return model


def _stepper(model, optimizer, in_graph):
    def step(tasks):
        with tf.GradientTape() as tape:
            a, b = model(ONES)
            loss = tf.reduce_mean(a) * ("a" in tasks) + 10 * tf.reduce_mean(b) * ("b" in tasks)
            loss = {"a": tf.reduce_mean(a), "b": 10 * tf.reduce_mean(b)}.get(tasks, loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    return tf.function(step) if in_graph else step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("name", OPTIONS)
def test_another_head_on_each_rank(name, in_graph):
    """Kernels and biases of both heads have one shape: without a word they would be added up."""

    def run(comm):
        model = _heads()
        step = _stepper(
            model, hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), **OPTIONS[name]), in_graph
        )
        step("ab")
        before = model.get_weights()
        with pytest.raises(tf.errors.InvalidArgumentError, match=DISAGREE) as told:
            step("ab"[comm.rank])
        return str(told.value), [
            np.array_equal(w, v) for w, v in zip(before, model.get_weights(), strict=True)
        ]

    for rank, (text, same) in enumerate(run_ranks(2, run)):
        assert f"there is no gradient of ['{'ba'[rank]}/kernel'" in text.replace("\\", "")
        assert all(same)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_the_same_head_on_all_ranks():
    def run(comm):
        model = _heads()
        step = _stepper(model, hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)), True)
        for tasks in ("ab", "a", "b", "a"):
            step(tasks)
        return [float(w.ravel()[0]) for w in model.get_weights()]

    # One step of each task takes 1 from head a and 10 from head b.
    assert run_ranks(2, run) == [[1 - 3, 1 - 3, 1 - 20, 1 - 20]] * 2


def test_a_layer_that_one_rank_freezes():
    def run(comm):
        model = _heads()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        optimizer.build(model.trainable_variables)

        def step(variables):
            with tf.GradientTape() as tape:
                loss = sum(map(tf.reduce_mean, model(ONES)))
            optimizer.apply(tape.gradient(loss, variables), variables)

        step(model.trainable_variables)
        frozen = model.trainable_variables[:2] if comm.rank else model.trainable_variables[2:]
        with pytest.raises(tf.errors.InvalidArgumentError, match="The ranks disagree about which gradients"):
            step(frozen)

    run_ranks(2, run)


@pytest.mark.parametrize("in_graph", [True, False], ids=["graph", "eager"])
def test_another_table_on_each_rank_where_all_gradients_are_sparse(in_graph):
    """What is gathered for a table that the other rank has left out would be waited for."""

    def run(comm):
        tables = [keras.Variable(np.ones((4, 2)), name=name) for name in ("one", "two")]
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))

        def step(used):
            rows = [tf.IndexedSlices(tf.ones([1, 2]), tf.constant([1]), tf.constant([4, 2])) for _ in tables]
            optimizer.apply([g if u else None for g, u in zip(rows, used, strict=True)], tables)

        step = tf.function(step) if in_graph else step
        step((True, True))
        with pytest.raises(tf.errors.InvalidArgumentError, match=DISAGREE):
            step((comm.rank == 0, comm.rank == 1))
        return [table.numpy()[1, 0].item() for table in tables]

    assert run_ranks(2, run) == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_tape_notices_too(sparse):
    def run(comm):
        tables = [tf.Variable(np.ones((4, 2), "float32"), name=name) for name in ("one", "two")]

        def gradients(used):
            with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
                values = [tf.gather(t, [1]) if sparse else 2 * t for t in tables]
                loss = tf.add_n([tf.reduce_sum(v) * u for v, u in zip(values, used, strict=True) if u])
            return tape.gradient(loss, tables)

        gradients((1, 1))
        with pytest.raises(tf.errors.InvalidArgumentError, match=DISAGREE):
            gradients((1 - comm.rank, comm.rank))

    run_ranks(2, run)


@pytest.mark.slow
def test_what_an_earlier_training_has_left_over_is_dropped():
    """4 batches in cycles of 3 leave one, whose gradient belongs to other weights and other data."""

    def run(comm):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=3)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.ones((8, 1), "float32")])
        model.compile(optimizer, "mse")
        x = np.ones((16, 8), "float32")
        model.fit(x, 100 * x[:, :1], batch_size=4, verbose=0)
        model.set_weights([np.zeros((8, 1), "float32")])
        zeros = np.zeros((12, 8), "float32")
        model.fit(zeros, zeros[:, :1], batch_size=4, verbose=0)
        return int(optimizer.iterations), float(np.abs(model.get_weights()[0]).max())

    with pytest.warns(
        UserWarning, match="1 micro-batches that an earlier training of 'sgd.*' has left over are"
    ):
        assert run_ranks(2, run) == [(2, 0.0)] * 2
