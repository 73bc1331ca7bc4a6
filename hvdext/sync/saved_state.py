"""A sync's state as a part of its model's checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np


class SavedState(keras.losses.Loss):
    """Hangs on a model, where Keras finds it when it saves and loads weights.

    A loss is the simplest public class whose own state Keras saves with a model without taking it for a
    layer, a metric or a weight. A Keras without hvdext has no such object on its model and leaves alone what
    the file holds of it.

    Args:
        save: returns what to save, by name.
        load: is given it back.
    """

    def __init__(
        self, save: Callable[[], dict[str, np.ndarray]], load: Callable[[dict[str, np.ndarray]], None]
    ):
        super().__init__()
        self.save = save
        self.load = load

    def save_own_variables(self, store) -> None:
        """Keras calls it for each checkpoint."""
        for name, value in self.save().items():
            store[name] = value

    def load_own_variables(self, store) -> None:
        """Keras calls it for each checkpoint; the store is empty if the sync was not there then."""
        found = {name: np.asarray(store[name]) for name in store.keys()}  # noqa: SIM118, an HDF5 group
        if found:
            self.load(found)

    def call(self, y_true, y_pred):
        """A loss must have one; this one is never asked."""
        raise NotImplementedError


def hang(model: keras.Model, name: str, state: SavedState) -> None:
    """Makes `state` a part of the model's checkpoints, in the place of what had this name there."""
    setattr(model, f"_hvdext_sync_{name}", state)


def take_down(model: keras.Model, state: SavedState) -> None:
    """Leaves `state` out of the model's later checkpoints; nothing happens if another has its place."""
    for attribute in [name for name, value in vars(model).items() if value is state]:
        delattr(model, attribute)
