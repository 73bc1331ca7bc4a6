"""Something of ours is told of every `fit`, after the user's callbacks, whatever these are given as."""

import keras
import numpy as np
import pytest

from hvdext.keras_tools import every_fit


class Teller(keras.callbacks.Callback):
    def __init__(self, told, name):
        super().__init__()
        self._told, self._name = told, name

    def on_train_begin(self, logs=None):
        self._told.append((self._name, self.model.name))


@pytest.fixture
def told(monkeypatch):
    """What has been told; the follower's callback is called "ours"."""
    told = []

    def follow(model, x):
        return Teller(told, "ours") if model.name == "followed" else None

    monkeypatch.setattr(every_fit, "_followers", [])
    monkeypatch.setattr(keras.Model, "fit", super(keras.Model, keras.Model).fit)
    for _ in range(2):  # the second time, nothing changes
        every_fit.follow_every_fit(follow)
    return told


def _model(name):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)], name=name)
    model.compile("sgd", "mse", run_eagerly=True)
    return model


X = np.ones((2, 1), "float32")


def test_without_callbacks(told):
    _model("followed").fit(X, X, verbose=0)
    assert told == [("ours", "followed")]


def test_another_model(told):
    _model("another").fit(X, X, verbose=0)
    assert told == []


@pytest.mark.parametrize("wrap", [list, tuple, lambda callbacks: callbacks[0]], ids=["list", "tuple", "one"])
def test_after_the_user_s(told, wrap):
    given = wrap([Teller(told, "theirs")])
    _model("followed").fit(X, X, 2, 1, 0, given)  # by position
    assert told == [("theirs", "followed"), ("ours", "followed")]


def test_a_list_of_keras_s_own_stays_as_it_was(told):
    model = _model("followed")
    callbacks = keras.callbacks.CallbackList([Teller(told, "theirs")], add_history=True, model=model)
    for _ in range(2):
        model.fit(X, X, verbose=0, callbacks=callbacks)
    assert told == [("theirs", "followed"), ("ours", "followed")] * 2
    assert len(callbacks.callbacks) == 2  # theirs and the history


def test_what_fit_does_not_know(told):
    with pytest.raises(TypeError, match="unknown"):
        _model("followed").fit(X, X, unknown=1)
