"""Ranks that do not hold the same are told before they train on: what differs, and on which of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.guards import Guards
from hvdext.testing import run_ranks

pytestmark = pytest.mark.slow

X = np.arange(16, dtype="float32").reshape(8, 2) / 16


def _model(optimizer, value=0.5, **options):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
    model.set_weights([np.full_like(w, value) for w in model.get_weights()])
    model.compile(hvd.DistributedOptimizer(optimizer), "mse", **options)
    return model


def _fit(model, **options):
    model.fit(X, X[:, :1], batch_size=4, shuffle=False, verbose=0, **options)


def _refused(run, size=2):
    """The one error of all ranks, which train nothing with it."""
    told = []

    def one(comm):
        try:
            run(comm)
        except tf.errors.InvalidArgumentError as error:
            told.append(str(error))

    run_ranks(size, one)
    assert len(told) == size
    return told


@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
def test_weights_that_differ_at_the_start(eagerly):
    models = {}

    def run(comm):
        start = 0.25 if comm.rank == 2 else 0.5
        models[comm.rank] = _model(keras.optimizers.SGD(0.1), start, run_eagerly=eagerly)
        _fit(models[comm.rank])

    for text in _refused(run, size=3):
        assert "The ranks do not hold the same before this update" in text
        assert "/kernel" in text
        assert "[2]" in text or "\n2" in text  # the third rank
    assert [models[rank].get_weights()[0][0, 0] for rank in range(3)] == [0.5, 0.5, 0.25]


def test_weights_that_one_rank_loads_between_two_trainings():
    def run(comm):
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
        model = _model(keras.optimizers.Adam(0.1), comm.rank)
        _fit(model, callbacks=callbacks)
        if comm.rank == 0:
            model.set_weights([w + 1 for w in model.get_weights()])
        _fit(model, callbacks=callbacks)

    assert all("/kernel" in text for text in _refused(run))


def test_the_state_of_an_optimizer():
    def run(comm):
        model = _model(keras.optimizers.Adam(0.1))
        model.optimizer.build(model.trainable_variables)
        if comm.rank == 1:
            (momentum,) = [v for v in model.optimizer.variables if v.path.endswith("out_kernel_momentum")]
            momentum.assign([[1.0], [1.0]])
        _fit(model)

    assert all("out_kernel_momentum" in text for text in _refused(run))


def test_a_learning_rate_that_one_rank_s_callback_changes():
    updates = []

    def run(comm):
        Guards(check_every=3).keep_for(comm)
        model = _model(keras.optimizers.SGD(0.1))

        def change(batch, logs):
            if comm.rank == 0:
                updates.append(batch)
            elif batch == 1:
                model.optimizer.learning_rate = 0.05

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=change)
        model.fit(X, X[:, :1], batch_size=1, shuffle=False, verbose=0, callbacks=[callback])

    assert all("learning_rate" in text for text in _refused(run))
    assert updates == [0, 1, 2]  # looked at before the first and the fourth


def test_all_go_on_with_the_first_rank_s_values(capfd):
    def run(comm):
        Guards(on_divergence="broadcast").keep_for(comm)
        model = _model(keras.optimizers.SGD(0.1), 0.5 + comm.rank)
        _fit(model)
        return model.get_weights()

    first, second = run_ranks(2, run)
    weight = bias = np.float32(0.5)  # and the same in both rows
    weight = np.full((2, 1), weight)
    # The gradients of the first update are those of the ranks' own weights.
    for x, apart in ((X[:4], 1.0), (X[4:], 0.0)):
        errors = [2 * (x @ (weight + a) + bias + a - x[:, :1]) / 4 for a in (0.0, apart)]
        error = (errors[0] + errors[1]) / 2
        weight, bias = weight - 0.1 * x.T @ error, bias - 0.1 * error.sum(0)
    for weights in (first, second):
        np.testing.assert_allclose(weights[0], weight, rtol=1e-6)
        np.testing.assert_allclose(weights[1], bias, rtol=1e-6)
    assert capfd.readouterr().err.count("all ranks go on with the values of the first: ") == 1


def test_what_is_local_may_differ():
    def run(comm):
        model = _model(keras.optimizers.Adam(0.1))
        bias = model.layers[0].bias
        model.optimizer.register_local_var(bias)
        bias.assign([float(comm.rank)])
        _fit(model)
        return model.get_weights()

    first, second = run_ranks(2, run)
    assert first[1] != second[1]


def test_nobody_looks_if_told_so():
    def run(comm):
        Guards(check_every=0).keep_for(comm)
        _fit(_model(keras.optimizers.SGD(0.1), comm.rank))
        return comm.traffic()

    assert all("guard" not in traffic for traffic in run_ranks(2, run))


def test_ranks_that_would_look_at_different_updates():
    def run(comm):
        Guards(check_every=1 + comm.rank).keep_for(comm)
        _fit(_model(keras.optimizers.SGD(0.1)))

    with pytest.raises(
        ValueError, match=r"guards: rank 0: Guards\(check_every=1.*rank 1: Guards\(check_every=2"
    ):
        run_ranks(2, run)


def test_optimizers_that_are_attributes_of_the_model():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [keras.layers.Dense(1, name=name) for name in ("one", "two")]
            self.optimizers = {
                name: hvd.DistributedOptimizer(keras.optimizers.Adam(0.1, name=name)) for name in ("a", "b")
            }

        def call(self, x):
            return self.parts[0](x) + self.parts[1](x)

        def train_step(self, data):
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            for optimizer, part in zip(self.optimizers.values(), self.parts, strict=True):
                optimizer.apply(tape.gradient(loss, part.trainable_weights), part.trainable_weights)
            return {"loss": loss}

    def run(comm):
        model = Two()
        model(X)
        model.set_weights([np.ones_like(w) for w in model.get_weights()])
        model.compile()
        for optimizer, part in zip(model.optimizers.values(), model.parts, strict=True):
            optimizer.build(part.trainable_weights)
            for variable in optimizer.variables[2:]:
                variable.assign(tf.fill(variable.shape, 1.0 - comm.rank))
        _fit(model, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
        return [v.numpy() for o in model.optimizers.values() for v in [*o.variables, *model.variables]]

    first, second = run_ranks(2, run)
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("argument", [{"check_every": -1}, {"on_divergence": "ignore"}])
def test_bad_settings(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        hvd.init(**argument)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int8", "int64", "bool", "complex64"]
)
def test_one_value_in_many_is_seen(dtype):
    values = tf.cast(np.arange(1000) % 7, dtype)

    def run(comm):
        hook = hvd.DistributedOptimizer(keras.optimizers.SGD())._hvdext_hook
        mine = tf.Variable(values)
        if comm.rank:
            mine.assign(tf.tensor_scatter_nd_update(values, [[500]], tf.cast([0], dtype)))
        hook._guard.look(comm, lambda: [("mine", mine)])

    assert all("mine" in text for text in _refused(run))
