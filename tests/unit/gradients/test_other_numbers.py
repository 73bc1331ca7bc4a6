"""A rank that has made models and optimizers of its own before has other numbers in Keras' names."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

pytestmark = pytest.mark.slow

X = np.arange(16, dtype="float32").reshape(8, 2) / 16


def _throw_away(comm):
    for _ in range(comm.rank):
        keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(3)])
        keras.optimizers.Adam()
        keras.metrics.AUC()


def _model(optimizer="sgd", **options):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])
    model.compile(optimizer, "mse", **options)
    return model


def _alone(optimizer):
    model = _model(optimizer)
    model.fit(X, X[:, :1], batch_size=8, shuffle=False, epochs=2, verbose=0)
    return model.get_weights()


def _assert_trained(found, names):
    assert len(set(map(tuple, names))) == len(names)  # else this test shows nothing
    for weights in found:
        for mine, right in zip(weights, _alone(keras.optimizers.Adam(0.1)), strict=True):
            np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("uneven", [False, True])
def test_fit(uneven):
    def run(comm):
        _throw_away(comm)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.1))
        model = _model(optimizer)
        callbacks = [hvd.callbacks.UnevenBatches()] if uneven else []
        own = X[comm.rank :: 2]
        model.fit(own, own[:, :1], batch_size=4, shuffle=False, epochs=2, verbose=0, callbacks=callbacks)
        return model.get_weights(), [optimizer.name, *(v.path for v in model.variables)]

    found, names = zip(*run_ranks(2, run), strict=True)
    _assert_trained(found, names)


def test_a_tape():
    def run(comm):
        _throw_away(comm)
        optimizer = keras.optimizers.Adam(0.1)
        model = _model(optimizer)
        own = X[comm.rank :: 2]
        for _ in range(2):
            with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
                loss = tf.reduce_mean((model(own) - own[:, :1]) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return model.get_weights(), [v.path for v in model.variables]

    found, names = zip(*run_ranks(2, run), strict=True)
    _assert_trained(found, names)


def test_two_optimizers_keep_their_own_names():
    """What is `adam` on one rank is `adam_1` on the other, whose own `adam_1` is another one."""

    def run(comm):
        if comm.rank:
            keras.optimizers.SGD()
        made = [hvd.DistributedOptimizer(keras.optimizers.SGD(0.5)) for _ in range(2)]
        variables = [keras.Variable([0.0, 0.0]) for _ in made]

        @tf.function
        def step():
            for i, (optimizer, variable) in enumerate(zip(made, variables, strict=True)):
                optimizer.apply([tf.constant([1.0, 3.0]) * (i + 1) * (comm.rank + 1)], [variable])

        step()
        return [v.numpy().tolist() for v in variables]

    assert run_ranks(2, run) == [[[-0.75, -2.25], [-1.5, -4.5]]] * 2


def test_a_sync_of_weights():
    def run(comm):
        _throw_away(comm)
        model = _model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        sync = hvd.sync.PartialSync("*/kernel")
        sync.begin(model)
        sync.step()
        sync.end()
        return model.get_weights()[0]

    for kernel in run_ranks(2, run):
        np.testing.assert_array_equal(kernel, np.ones((2, 2)))


def test_metrics_with_other_names():
    def run(comm):
        _throw_away(comm)
        model = _model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), metrics=[keras.metrics.AUC()])
        model.fit(X, X[:, :1], verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()])

    with pytest.raises(
        ValueError, match=r"name='auc'.*rank 0: \['auc', 'loss'\]; rank 1: \['auc_1', 'loss'\]"
    ):
        run_ranks(2, run)


def test_layers_in_another_order_are_still_told():
    def run(comm):
        layers = [keras.layers.Dense(2) for _ in range(2)]
        model = keras.Sequential([keras.Input((2,)), *layers[:: 1 - 2 * comm.rank]])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        model.fit(X, X, verbose=0)

    with pytest.raises(ValueError, match=r"variable 0: rank 0: .*dense/kernel.*rank 1: .*dense_1/kernel"):
        run_ranks(2, run)
