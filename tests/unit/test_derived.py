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
