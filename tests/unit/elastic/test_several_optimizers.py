"""Optimizers that are attributes of a model are part of its state, and told apart where one is needed."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.keras_tools.models import optimizers_of
from hvdext.testing import run_ranks


def _gan(*, compiled=False):
    """Two parts with an optimizer each; `compile` without arguments gives it one more that nobody uses."""
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, name="g"), keras.layers.Dense(1, name="d")]
    )
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD()) if compiled else "rmsprop", "mse")
    model.parts = {
        name: hvd.DistributedOptimizer(keras.optimizers.Adam(0.1, name=name)) for name in ("of_g", "of_d")
    }
    for optimizer, layer in zip(model.parts.values(), model.layers, strict=True):
        optimizer.build(layer.trainable_variables)
    return model


def _fill(model, value):
    for optimizer in model.parts.values():
        for variable in optimizer.variables:
            variable.assign(np.full(variable.shape, value))


def _values(model):
    return [float(np.mean(v.numpy())) for optimizer in model.parts.values() for v in optimizer.variables]


def test_a_state_is_synchronised_and_restored_with_all_of_them():
    def run(comm):
        model = _gan()
        _fill(model, 3.0 + comm.rank)
        state = hvd.elastic.KerasState(model)
        state.sync()
        synced = _values(model)
        _fill(model, 9.0)
        state.restore()
        return synced, _values(model)

    for synced, restored in run_ranks(2, run):
        assert set(synced) == {3.0}
        assert synced == restored


def test_a_model_that_is_not_compiled_has_those_of_its_attributes():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.own = keras.optimizers.Adam()
    assert hvd.elastic.KerasState(model).optimizer is model.own


def test_those_of_models_within():
    generator = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    generator.compile(hvd.DistributedOptimizer("adam"), "mse")
    whole = keras.Sequential([keras.Input((2,)), generator, keras.layers.Dense(1)])
    whole.compile("sgd", "mse")
    assert [type(one).__name__ for one in optimizers_of(whole)] == ["SGD", "Adam"]


@pytest.mark.parametrize("compiled", [False, True])
def test_uneven_batches_need_a_single_one(compiled):
    def run(comm):
        model = _gan(compiled=compiled)
        x = np.ones((4, 2), "float32")
        model.fit(x, x[:, :1], verbose=0, callbacks=[hvd.callbacks.UnevenBatches()])

    with pytest.raises(ValueError, match=r"`UnevenBatches` needs a model .*among"):
        run_ranks(2, run)
