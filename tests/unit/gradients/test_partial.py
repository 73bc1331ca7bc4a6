"""Local layers: their gradients stay on the rank, divided by the number of ranks or not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

OPTIONS = {"scaled": True, "as they are": False}


def _layers():
    """Two layers y = x * k, to be trained with the loss sum(y): the gradient of k is x, summed over rows."""
    return [keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros", name=n) for n in ("own", "all")]


def _inputs(rank):
    return np.full((1, 2), rank + 1.0, "float32")


def _expected(rank, size, scale_local):
    """What SGD with learning rate 1 leaves in (own, all)."""
    mine, mean = rank + 1.0, np.mean([r + 1.0 for r in range(size)])
    return [-mine / size if scale_local else -mine, -mean]


def _step(layers, optimizer, rank):
    x = _inputs(rank)
    with tf.GradientTape() as tape:
        loss = sum(tf.reduce_sum(layer(x)) for layer in layers)
    variables = [layer.kernel for layer in layers]
    optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("scale_local", OPTIONS.values(), ids=OPTIONS)
def test_optimizer(built, scale_local):
    def one_rank(comm):
        layers = _layers()
        if built:
            for layer in layers:
                layer.build((None, 2))
        optimizer = hvd.PartialDistributedOptimizer(
            keras.optimizers.SGD(1.0), local_layers=layers[0], scale_local_gradients=scale_local
        )
        assert isinstance(optimizer, keras.optimizers.SGD)
        _step(layers, optimizer, comm.rank)
        return [layer.kernel.numpy()[0, 0] for layer in layers]

    for rank, values in enumerate(run_ranks(2, one_rank)):
        np.testing.assert_allclose(values, _expected(rank, 2, scale_local), rtol=1e-6)


@pytest.mark.parametrize("scale_local", OPTIONS.values(), ids=OPTIONS)
def test_tape(scale_local):
    def one_rank(comm):
        layers, x = _layers(), _inputs(comm.rank)
        recording = hvd.PartialDistributedGradientTape(
            tf.GradientTape(), local_layers=[layers[0]], scale_local_gradients=scale_local
        )
        with recording as tape:
            loss = sum(tf.reduce_sum(layer(x)) for layer in layers)
        gradients = tape.gradient(loss, [layer.kernel.value for layer in layers])
        return [-gradient.numpy()[0, 0] for gradient in gradients]

    for rank, values in enumerate(run_ranks(2, one_rank)):
        np.testing.assert_allclose(values, _expected(rank, 2, scale_local), rtol=1e-6)


def test_tape_over_local_sources_only():
    def one_rank(comm):
        layer, x = _layers()[0], _inputs(comm.rank)
        with hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=layer) as tape:
            loss = tf.reduce_sum(layer(x))
        return tape.gradient(loss, [layer.kernel.value])[0].numpy()[0, 0]

    assert run_ranks(2, one_rank) == [0.5, 1.0]


@pytest.mark.parametrize("built", [True, False])
def test_nested_model_in_fit(built):
    """Weights of the inner model drift apart as each rank's data say; those of the outer layer do not."""

    def one_rank(comm):
        inner = keras.Sequential(
            [keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="deep")], name="inner"
        )
        model = keras.Sequential(
            [inner, keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="outer")]
        )
        if built:
            model.build((None, 1))
        optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(0.1), local_layers=[inner])
        model.compile(optimizer, loss=lambda y, prediction: prediction, jit_compile=False, run_eagerly=True)
        model.train_on_batch(np.full((1, 1), comm.rank + 1.0), np.zeros((1, 1)))
        return [float(weights[0, 0]) for weights in model.get_weights()]

    # With both weights 1 the gradient of each is x: 1 on rank 0, 2 on rank 1.
    np.testing.assert_allclose(run_ranks(2, one_rank), [[0.95, 0.85], [0.9, 0.85]], rtol=1e-6)


@pytest.mark.parametrize("local_layers", [None, []])
def test_without_local_layers_everything_is_exchanged(local_layers):
    def one_rank(comm):
        layers = _layers()
        _step(
            layers,
            hvd.PartialDistributedOptimizer(keras.optimizers.SGD(1.0), local_layers=local_layers),
            comm.rank,
        )
        return [layer.kernel.numpy()[0, 0] for layer in layers]

    np.testing.assert_allclose(run_ranks(2, one_rank), [[-1.5, -1.5]] * 2, rtol=1e-6)


def test_all_layers_local():
    """Built layers: every rank for itself. Layers built later: an error that names them."""

    def one_rank(comm, built):
        layers = _layers()
        if built:
            for layer in layers:
                layer.build((None, 2))
        optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(1.0), local_layers=layers)
        _step(layers, optimizer, comm.rank)
        return [layer.kernel.numpy()[0, 0] for layer in layers]

    np.testing.assert_allclose(run_ranks(2, one_rank, True), [[-0.5, -0.5], [-1, -1]], rtol=1e-6)
    with pytest.raises(ValueError, match=r"must match at least one.*local_layers=\['own', 'all'\]"):
        run_ranks(2, one_rank, False)


def test_micro_batches():
    def one_rank(comm):
        layers = _layers()
        optimizer = hvd.PartialDistributedOptimizer(
            keras.optimizers.SGD(1.0), local_layers=layers[0], backward_passes_per_step=2
        )
        for _ in range(2):
            _step(layers, optimizer, comm.rank)
        return [layer.kernel.numpy()[0, 0] for layer in layers]

    np.testing.assert_allclose(run_ranks(2, one_rank), [[-1, -3], [-2, -3]], rtol=1e-6)


@pytest.mark.parametrize("wrong", ["dense", 3, [keras.optimizers.SGD()]])
def test_refusals(wrong):
    with pytest.raises(TypeError, match=r"`local_layers` must be a Keras layer, several or None. Received: "):
        hvd.PartialDistributedOptimizer(keras.optimizers.SGD(), local_layers=wrong)
    with pytest.raises(TypeError, match=r"`local_layers` must be a Keras layer, several or None. Received: "):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=wrong)
