"""Syncs side by side: none exchanges under another's name, or is saved in another's place."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.sync.engine import names
from hvdext.testing import run_ranks


def model_of(value):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="a"), keras.layers.Dense(1)])
    model.set_weights([np.full(w.shape, value) for w in model.get_weights()])
    return model


def partial(pattern, name=None):
    what = hvd.sync.Matching(pattern)
    return hvd.sync.ParameterSync(hvd.sync.Every(2, delay=1), what=what, name=name)


def in_use(*syncs):
    return [sync._engine._name for sync in syncs]


def test_a_sync_of_an_earlier_training_keeps_its_name_to_itself():
    with use(SoloComm()):
        model = model_of(1.0)
        model.compile("sgd", "mse")
        a, b, c = partial("*a/bias"), partial("*dense*"), partial("*a/kernel")
        for syncs in [(a, b), (b, c), (a, c)]:
            model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0, callbacks=list(syncs))
            assert len(set(in_use(*syncs))) == 2


def test_syncs_of_two_models_have_names_of_their_own():
    with use(SoloComm()):
        models, syncs = [model_of(1.0), model_of(2.0)], [partial("*"), partial("*")]
        for sync, model in zip(syncs, models, strict=True):
            sync.begin(model)
        assert len(set(in_use(*syncs))) == 2


@pytest.mark.parametrize("given", [["1", None], [None, "1", None]])
def test_numbers_make_way_for_names(given, tmp_path):
    with use(SoloComm()):
        patterns = ["*a/bias", "*a/kernel", "*dense*/kernel"]
        model, syncs = model_of(1.0), [partial(*one) for one in zip(patterns, given, strict=False)]
        for sync in syncs:
            sync.begin(model)
        for steps, sync in enumerate(syncs, 3):
            sync.step(steps)
        assert len(set(in_use(*syncs))) == len(given)
        model.save_weights(tmp_path / "saved.weights.h5")
        model, syncs = model_of(1.0), [partial(*one) for one in zip(patterns, given, strict=False)]
        for sync in syncs:
            sync.attach(model)
        model.load_weights(tmp_path / "saved.weights.h5")
        for steps, sync in enumerate(syncs, 3):
            sync.begin(model)
            assert sync.steps == steps


def test_a_name_that_is_a_number_already_is_refused():
    with use(SoloComm()):
        model = model_of(1.0)
        partial("*a/bias").attach(model)
        with pytest.raises(ValueError, match="`name` must differ between the syncs of one model, and from"):
            partial("*a/kernel", "0").attach(model)


@pytest.mark.parametrize("name", ["my sync", "", "a.b", 1])
def test_a_name_that_no_collective_can_have_is_refused(name):
    with pytest.raises(ValueError, match=r"`name` must be .* Received: name=" + repr(name)):
        partial("*", name)


def test_ranks_agree_on_a_name_that_is_free_on_all():
    class Living:
        def __init__(self, comm):
            self.comm = comm

    def rank(comm):
        living = [Living(comm), Living(comm)]
        if comm.rank == 0:
            names.take("0", living[0])
        else:
            names.take("x", living[0])
            names.take("1", living[1])
        return names.agree(comm, None), names.agree(comm, "x"), names.agree(comm, "y")

    assert run_ranks(2, rank) == [("2", "x-1", "y")] * 2


def test_a_name_is_free_again_once_its_engine_is_gone():
    class Living:
        comm = SoloComm()

    living = Living()
    names.take("0", living)
    assert names.agree(Living.comm, None) == "1"
    del living
    assert names.agree(Living.comm, None) == "0"
