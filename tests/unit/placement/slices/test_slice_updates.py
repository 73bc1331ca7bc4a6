"""Optimizers of cut models: norms, overflows, refusals, slices that must not be mixed; ranks as threads."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.keras_tools.slice_marks import Slice, mark
from hvdext.placement.slices import updates
from hvdext.testing import run_ranks
from tests.multiprocess.programs.slice_programs import whole_over

GRADIENT = np.array([3.0, 4.0, 12.0, 84.0], "float32")  # norm 85
BIAS = np.array([132.0], "float32")  # with it 157


def _variables(comm):
    """A vector of zeros, cut into two, and a whole variable."""
    part = Slice(0, comm.rank, 2)
    cut = keras.Variable(np.zeros(2, "float32"), name="cut")
    mark(cut, part, comm)
    updates.watch_optimizers()
    return part, [cut, keras.Variable(np.zeros(1, "float32"), name="whole")]


def _applied(optimizer_of, graph=False):
    def run(comm):
        part, variables = _variables(comm)
        optimizer = optimizer_of()
        gradients = [tf.constant(part.of(GRADIENT)), tf.constant(BIAS)]
        optimizer.build(variables)
        step = tf.function(optimizer.apply) if graph else optimizer.apply
        step(gradients)
        cut, whole = variables
        return cut.numpy(), whole.numpy()

    ranks = run_ranks(2, run)
    np.testing.assert_array_equal(ranks[0][1], ranks[1][1])
    return np.concatenate([ranks[0][0], ranks[1][0], ranks[0][1]])


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({"global_clipnorm": 78.5}, [-1.5, -2, -6, -42, -66]),
        ({"global_clipnorm": 1000.0}, [-3, -4, -12, -84, -132]),
        ({"clipnorm": 17.0}, [-0.6, -0.8, -2.4, -16.8, -17]),
        ({"clipvalue": 5.0}, [-3, -4, -5, -5, -5]),
        ({}, [-3, -4, -12, -84, -132]),
    ],
)
def test_clipping_sees_whole_gradients(clip, expected, graph):
    found = _applied(lambda: keras.optimizers.SGD(1.0, **clip), graph)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_clipping_of_sparse_gradients_equals_keras():
    """Keras' norms see repeated rows one by one, and so do ours."""
    indices = [0, 3, 3, 1]
    values = np.arange(8.0, dtype="float32").reshape(4, 2)
    plain = keras.Variable(np.zeros((4, 2), "float32"), name="plain")
    keras.optimizers.SGD(1.0, clipnorm=1.0).apply([tf.IndexedSlices(values, indices, [4, 2])], [plain])

    def run(comm):
        cut = keras.Variable(np.zeros((2, 2), "float32"), name="cut")
        mark(cut, Slice(0, comm.rank, 2), comm)
        own = [i for i, row in enumerate(indices) if row // 2 == comm.rank]
        rows = [indices[i] % 2 for i in own]
        slices = tf.IndexedSlices(values[own], tf.constant(rows), [2, 2])
        keras.optimizers.SGD(1.0, clipnorm=1.0).apply([slices], [cut])
        return cut.numpy()

    np.testing.assert_allclose(np.concatenate(run_ranks(2, run)), plain.numpy(), rtol=1e-6)


def test_an_overflow_of_one_slice_makes_all_ranks_skip():
    def run(comm):
        part, variables = _variables(comm)
        inner = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), process_set=hvd.ProcessSet([comm.rank]))
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        steps = []
        for step in range(3):
            gradient = 8 * part.of(GRADIENT)
            if step == 1 and comm.rank == 1:
                gradient[0] = np.inf
            # The second and third steps: the scale that the overflow has halved is the same everywhere.
            optimizer.apply([tf.constant(gradient), tf.constant(8 * BIAS)], variables)
            steps.append([*variables[0].numpy(), float(optimizer.dynamic_scale)])
        return steps

    for rank, (first, skipped, last) in enumerate(run_ranks(2, run)):
        own = GRADIENT[:2] if rank == 0 else GRADIENT[2:]
        np.testing.assert_allclose(first, [*-own, 8])
        np.testing.assert_allclose(skipped, [*-own, 4])
        np.testing.assert_allclose(last, [*-3 * own, 4])


def test_xla_is_refused():
    def run(comm):
        _, variables = _variables(comm)
        optimizer = keras.optimizers.SGD(1.0, global_clipnorm=1.0)
        optimizer.build(variables)
        step = tf.function(lambda: optimizer.apply([tf.ones(2), tf.ones(1)], variables), jit_compile=True)
        with pytest.raises(RuntimeError, match=r"hvdext.slices.\S+ must not stand in a function that XLA"):
            step()

    run_ranks(2, run)


@pytest.mark.parametrize("kind", ["Adafactor", "Lamb", "Muon"])
def test_optimizers_that_look_at_whole_matrices_are_refused(kind):
    message = f"`optimizer` must update each element by itself .*; {kind} looks at .* for the cut 'cut'"
    with pytest.raises(ValueError, match=message):
        _applied(lambda: getattr(keras.optimizers, kind)(0.1))


def test_keras_accumulation_with_clipping_is_refused():
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps` must be None with clipping by norm"):
        _applied(lambda: keras.optimizers.SGD(0.1, clipnorm=1.0, gradient_accumulation_steps=2))
    found = _applied(lambda: keras.optimizers.SGD(1.0, gradient_accumulation_steps=1 + 1))
    np.testing.assert_array_equal(found, np.zeros(5))  # the first of two


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("other", ["inputs", "targets"])
@pytest.mark.slow
def test_ranks_with_different_samples_are_stopped(other, eager):
    x = np.arange(12.0, dtype="float32").reshape(2, 6)

    def run(comm, same=False):
        inputs = keras.Input((6,))
        up = hvd.ColumnDense(4, kernel_initializer="ones", name="up")
        model = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones")(up(inputs)))
        model.compile("sgd", "mse", run_eagerly=eager)
        apart = 0 if same else comm.rank
        model.train_on_batch(x + apart * (other == "inputs"), x[:, :1] + apart * (other == "targets"))

    run_ranks(2, run, True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must get the same samples in the same order"):
        run_ranks(2, run)


def test_slices_are_never_mixed():
    """Broadcasts and gradients over all ranks would mix them: the error is the same on every rank."""
    mixed = r"slice 0 of 2 along axis 0.*rank 1: .*\(2,\) float32, slice 1 of 2 along axis 0"

    def run(comm):
        _, variables = _variables(comm)
        with pytest.raises(ValueError, match=mixed):
            hvd.broadcast_variables([v.value for v in variables])
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        with pytest.raises(ValueError, match=mixed):
            optimizer.apply([tf.ones(2), tf.ones(1)], variables)

    run_ranks(2, run)


@pytest.mark.slow
def test_grid_of_data_and_slices_equals_one_process_with_the_whole_batch():
    """Also: broadcast and gradients over the data axis only, norms over the slices only."""
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    y = np.random.default_rng(1).normal(size=(16, 2)).astype("float32")

    def make():
        keras.utils.set_random_seed(1)
        inputs = keras.Input((6,))
        up = keras.layers.Dense(8, activation="tanh", name="up")(inputs)
        return keras.Model(inputs, keras.layers.Dense(2, name="down")(up), name="mlp")

    def optimizer():
        return keras.optimizers.AdamW(0.05, global_clipnorm=0.3)

    plain = make()
    start = plain.get_weights()
    plain.compile(optimizer(), "mse")
    plain.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    models = [make() for _ in range(4)]

    def run(comm):
        grid = hvd.Grid(data=2, slices=2)
        with grid.data_parallel():
            model = models[comm.rank]
            model.set_weights([w + grid.data.rank for w in start])  # the second's are overwritten
            cut = hvd.slice_layers(model, {"up": "column", "down": "row"})
            cut.compile(hvd.DistributedOptimizer(optimizer()), "mse")
            data = hvd.data.shard(x, y, batch_size=4, shuffle=False)
            first = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
            cut.fit(data, epochs=2, shuffle=False, callbacks=[first], verbose=0)
        return whole_over(grid.slices)(cut.weights, [v.numpy() for v in cut.weights])

    ranks = run_ranks(4, run)
    for found in ranks:
        for mine, first, theirs in zip(found, ranks[0], plain.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, first)
            np.testing.assert_allclose(mine, theirs, atol=1e-5)
