"""`hvd.load_model` against plain Keras that goes on without saving."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

X = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")


class MyAdam(keras.optimizers.Adam):
    """A class that only its owner knows."""


def _trained(make=lambda: keras.optimizers.Adam(0.05), loss="mse", policy="float32"):
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    first = keras.layers.Dense(4, activation="tanh", dtype=policy)
    model = keras.Sequential([keras.Input((3,)), first, keras.layers.Dense(2, dtype=policy)])
    optimizer = make()
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
    model.compile(optimizer, loss, metrics=["mae"], jit_compile=False)
    for _ in range(3):
        model.train_on_batch(X, Y)
    return model


def _state(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def _assert_goes_on_like(model, loaded):
    """The loaded model is where the other one is, and takes the same next step."""
    for mine, theirs in zip(_state(loaded), _state(model), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    before = model.get_weights()
    model.train_on_batch(X, Y)
    loaded.train_on_batch(X, Y)
    assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-3
    for mine, theirs in zip(_state(loaded), _state(model), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.fixture(autouse=True)
def one_rank():
    hvd.init()
    yield
    hvd.shutdown()


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.slow
def test_the_next_step_is_the_one_of_plain_keras(tmp_path, ending, policy):
    model = _trained(policy=policy)
    model.save(tmp_path / f"model.{ending}")
    loaded = hvd.load_model(tmp_path / f"model.{ending}")
    assert type(loaded.optimizer) is type(model.optimizer)
    assert int(loaded.optimizer.iterations) == 3
    _assert_goes_on_like(model, loaded)


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.slow
def test_an_open_h5_file(tmp_path, mode):
    model = _trained(loss="mean_squared_error")
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", mode) as file:
        _assert_goes_on_like(model, hvd.load_model(file))


def test_an_h5_file_in_memory_is_refused():
    with (
        h5py.File("nowhere.h5", "w", driver="core", backing_store=False) as file,
        pytest.raises(ValueError, match=r"`filepath` must be a file on disk.*nowhere.h5"),
    ):
        hvd.load_model(file)


@pytest.mark.parametrize("ending", ["keras", "h5"])
@pytest.mark.slow
def test_optimizers_of_ones_own(tmp_path, ending):
    model = _trained(lambda: MyAdam(0.05))
    path = str(tmp_path / f"model.{ending}")
    model.save(path)
    loaded = hvd.load_model(path, custom_optimizers=[MyAdam])
    assert type(loaded.optimizer) is MyAdam
    _assert_goes_on_like(model, loaded)


@pytest.mark.slow
def test_custom_objects(tmp_path):
    def doubled(y_true, y_pred):
        return 2 * keras.losses.mean_squared_error(y_true, y_pred)

    model = _trained(loss=doubled)
    model.save(tmp_path / "model.keras")
    _assert_goes_on_like(model, hvd.load_model(tmp_path / "model.keras", custom_objects={"doubled": doubled}))


def test_gradients_are_averaged_over_the_ranks(tmp_path):
    """Two ranks with half of the batch each step like one process with all of it."""
    model = _trained(lambda: keras.optimizers.SGD(0.1, momentum=0.9))
    path = tmp_path / "model.keras"
    model.save(path)
    model.train_on_batch(X, Y)

    def one_rank(comm):
        loaded = hvd.load_model(path)
        half = slice(4 * comm.rank, 4 * comm.rank + 4)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((loaded(X[half]) - Y[half]) ** 2)
        gradients = tape.gradient(loss, [v.value for v in loaded.trainable_variables])
        loaded.optimizer.apply(gradients, loaded.trainable_variables)
        return loaded.get_weights()

    for weights in run_ranks(2, one_rank):
        for mine, theirs in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ending", ["keras", "h5"])
def test_a_model_without_optimizer_comes_with_a_warning(tmp_path, ending):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / f"model.{ending}")
    with pytest.warns(UserWarning, match=r"without an optimizer: compile it with hvd.DistributedOptimizer"):
        loaded = hvd.load_model(tmp_path / f"model.{ending}")
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"`legacy_opts` must be False.*compile=False"):
        hvd.load_model("model.keras", legacy_opts=True)
    for wrong in ([keras.optimizers.Adam()], keras.layers.Dense):
        with pytest.raises(TypeError, match="`custom_optimizers` must be a list of subclasses"):
            hvd.load_model("model.keras", custom_optimizers=wrong)
    with pytest.raises(TypeError, match="Did you mean `custom_objects`"):
        hvd.load_model("model.keras", custom_object={})
