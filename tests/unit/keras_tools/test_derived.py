"""An adapted `Normalization` computes with what it derives from its variables, wherever they are assigned."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.testing import run_ranks

L = keras.layers
X = np.random.default_rng(0).normal(5, 3, (8, 4)).astype("float32")


def _model(adapted=True):
    x = keras.Input((4,), name="x")
    scale = L.Normalization(name="scale")
    outputs = L.Dense(2, kernel_initializer=keras.initializers.HeNormal(seed=0), name="last")(scale(x))
    model = keras.Model(x, outputs, name="scaled")
    if adapted:
        scale.adapt(X)
    return model


def _builder():
    model = _model(adapted=False)
    model.set_weights(_model().get_weights())
    return model


# -- models in parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("builds", [False, True])
def test_pipelines(builds):
    given = _model()
    expected = given.predict(X, verbose=0)

    def run(comm):
        model = _builder if builds else given
        with hvd.Grid(data=1, pipeline=2).data_parallel():
            plan = hvd.plan(model, places=2, pins={"scale": 0, "last": 1})
            return hvd.pipeline(model, plan, 2).predict(X, batch_size=8, verbose=0)

    for found in run_ranks(2, run):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_cut_models_and_what_they_load(tmp_path):
    path = tmp_path / "scaled.keras"
    given = _model()
    expected = given(X)
    given.save(path)
    models = [given, _model(adapted=False)]
    plain = [_model(adapted=False) for _ in range(2)]

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], {"last": "column"})
        loaded = hvd.slice_layers(plain[comm.rank], {"last": "column"})
        before = loaded.predict(X, verbose=0)
        hvd.load_uncut(loaded, path)
        return before, [model.predict(X, verbose=0) for model in (cut, loaded)]

    for before, after in run_ranks(2, run):
        assert np.abs(before - expected).max() > 1
        for found in after:
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_layers_have_learnt_otherwise_is_kept():
    steps = L.Discretization(num_bins=4, name="steps")
    steps.adapt(X[:, :1])
    model = keras.Sequential([keras.Input((1,)), steps, L.Embedding(4, 2)])
    placed = hvd.place(model, hvd.plan(model, places=1))
    np.testing.assert_array_equal(placed(X[:, :1]), model(X[:, :1]))


# -- ranks that become alike ---------------------------------------------------------------------------


class _Loads(keras.callbacks.Callback):
    def __init__(self, path):
        super().__init__()
        self._path = path

    def on_train_begin(self, logs=None):
        self.model.load_weights(self._path)


def _fit(model, callback):
    model.fit(X, np.zeros((8, 2)), batch_size=8, verbose=0, callbacks=[callback])


def _sync(model):
    hvd.elastic.KerasState(model).sync()


def _restore(model):
    state = hvd.elastic.KerasState(model)
    model.get_layer("scale").adapt(3 * X)
    model.make_predict_function(force=True)
    model.make_test_function(force=True)
    state.restore()


CALLBACKS = {
    "broadcast": lambda path: hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    "warm-up": lambda path: hvd.callbacks.WarmupPerturbation(verbose=0),
    "as one process": lambda path: hvd.callbacks.AsOneProcess([_Loads(path)]),
    "consensus": lambda path: hvd.callbacks.ConsensusAveraging(verbose=0),
}


@pytest.mark.parametrize("way", [*CALLBACKS, _sync, _restore])
@pytest.mark.slow
def test_ranks_of_which_one_was_adapted(way, tmp_path):
    """Also where Keras has traced the model before."""
    path = tmp_path / "scaled.weights.h5"
    _model().save_weights(path)
    plain = _model(adapted=False)

    def run(comm):
        loads = way == "as one process"
        model = _model(adapted=comm.rank == 0 and not loads)
        optimizer = keras.optimizers.SGD(0.0)  # which nobody would let train together before they are alike
        model.compile(optimizer if way == "consensus" else hvd.DistributedOptimizer(optimizer), "mse")
        if not loads:  # after `load_weights` Keras itself would go on with what it has traced
            model.predict(X, verbose=0)
            model.evaluate(X, np.zeros((8, 2)), verbose=0)
        if callable(way):
            way(model)
        else:
            _fit(model, CALLBACKS[way](path))
        found = model.predict(X, verbose=0)
        loss = model.evaluate(X, np.zeros((8, 2)), batch_size=8, verbose=0)
        return found, loss, model.get_weights()

    for found, loss, weights in run_ranks(2, run):
        plain.set_weights(weights)
        plain.get_layer("scale").finalize_state()
        expected = plain(X).numpy()
        assert way is _restore or np.abs(plain.get_layer("scale").mean).max() > 1
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_allclose(loss, np.mean(expected**2), rtol=1e-4)


@pytest.mark.slow
def test_a_model_that_is_built_by_its_first_batch():
    def run(comm):
        scale = L.Normalization()
        if comm.rank == 0:
            scale.adapt(X)
        model = keras.Sequential([scale, L.Dense(2)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
        losses = []
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(logs["loss"]))
        begin = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        model.fit(X, np.zeros((8, 2)), batch_size=8, verbose=0, callbacks=[begin, look])
        return losses[0], model.layers[1].get_weights()

    scaled = (X - X.mean(0)) / X.std(0)
    for loss, (kernel, bias) in run_ranks(2, run):
        np.testing.assert_allclose(loss, np.mean((scaled @ kernel + bias) ** 2), rtol=1e-4)
