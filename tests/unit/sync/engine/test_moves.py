"""One sync object and several models, one after the other, as in a cross-validation."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.sync.attachment import attached


@pytest.fixture(autouse=True)
def alone():
    with use(SoloComm()):
        yield


def model_of(value):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)], name="small")
    model.set_weights([np.full(w.shape, value) for w in model.get_weights()])
    return model


def centre(sync):
    return np.unique(sync._engine.states[0].fragment.read_centre()).tolist()


def resumed(model, file):
    """What a new sync finds in a model's checkpoint."""
    sync = hvd.sync.DiLoCo(2)
    sync.attach(model)
    model.load_weights(file)
    sync.begin(model)
    return centre(sync), sync.steps


def test_a_models_checkpoint_holds_nothing_of_the_next_ones(tmp_path):
    a, b, sync = model_of(1.0), model_of(100.0), hvd.sync.DiLoCo(2)
    for steps, model in enumerate([a, b], 1):
        sync.begin(model)
        sync.step(steps)
        sync.end()
    a.save_weights(tmp_path / "a.weights.h5")
    b.save_weights(tmp_path / "b.weights.h5")
    assert resumed(model_of(1.0), tmp_path / "a.weights.h5") == ([1.0], 0)
    assert resumed(model_of(7.0), tmp_path / "b.weights.h5") == ([100.0], 2)
    assert (attached(a), attached(b)) == ([], [sync])


def test_what_was_loaded_with_one_model_is_not_restored_into_the_next(tmp_path):
    saved, sync = model_of(1.0), hvd.sync.DiLoCo(2)
    sync.begin(saved)
    sync.step()
    saved.save_weights(tmp_path / "saved.weights.h5")
    c, d, sync = model_of(1.0), model_of(100.0), hvd.sync.DiLoCo(2)
    sync.attach(c)
    c.load_weights(tmp_path / "saved.weights.h5")
    sync.begin(d)
    assert (centre(sync), sync.steps) == ([100.0], 0)
    c.load_weights(tmp_path / "saved.weights.h5")
    assert (centre(sync), sync.steps) == ([100.0], 0)


def test_a_sync_that_moves_on_leaves_its_successors_state_in_place(tmp_path):
    a, b, first, second = model_of(1.0), model_of(100.0), hvd.sync.DiLoCo(2), hvd.sync.DiLoCo(2)
    a.compile("sgd", "mse")
    for sync in (first, second):
        a.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0, callbacks=[sync])
    second.step(4)
    first.begin(b)
    a.save_weights(tmp_path / "a.weights.h5")
    assert resumed(model_of(1.0), tmp_path / "a.weights.h5")[1] == 5


def test_a_sync_that_changes_its_place_is_saved_once():
    model, first, second = model_of(1.0), hvd.sync.LocalSGD(2), hvd.sync.LocalSGD(2)
    model.compile("sgd", "mse")
    for syncs in ([first, second], [second]):
        model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0, callbacks=syncs)
    assert [name for name in vars(model) if name.startswith("_hvdext_sync_")] == ["_hvdext_sync_0"]
