"""Something that is told when any model's `fit` begins."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

Follower = Callable[[keras.Model, Any], keras.callbacks.Callback | None]

_followers: list[Follower] = []


def follow_every_fit(follower: Follower) -> None:
    """From now on `follower(model, x)` is called when a model's `fit` is; the second time, nothing changes.

    Args:
        follower: takes the model and `fit`'s data; returns a callback to be called after the user's, or None.
    """
    if not _followers:
        keras.Model.fit = _entrance(keras.Model.fit)
    if follower not in _followers:
        _followers.append(follower)


def _entrance(keras_fit):
    signature = inspect.signature(keras_fit)

    @functools.wraps(keras_fit)
    def fit(self, *args, **kwargs):
        try:
            call = signature.bind(self, *args, **kwargs)
        except TypeError:  # Keras says so
            return keras_fit(self, *args, **kwargs)
        x = call.arguments.get("x")
        added = [callback for follower in _followers if (callback := follower(self, x)) is not None]
        given = call.arguments.get("callbacks")
        if isinstance(given, keras.callbacks.CallbackList):
            return _with_appended(given, added, lambda: keras_fit(*call.args, **call.kwargs))
        call.arguments["callbacks"] = [*keras.tree.flatten(given or []), *added]
        return keras_fit(*call.args, **call.kwargs)

    return fit


def _with_appended(callbacks, added, action):
    """Calls `action` while a list of the user's own holds more callbacks."""
    for callback in added:
        callbacks.callbacks.append(callback)
        callback.set_model(callbacks.model)
    try:
        return action()
    finally:
        for callback in added:
            callbacks.callbacks.remove(callback)
