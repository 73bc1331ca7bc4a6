"""The lines of a script that change: in plain Keras they do nothing, on ranks they are hvdext's."""

from __future__ import annotations

import keras


class Alone:
    """Plain Keras, one process, the whole batch."""

    size = 1
    callbacks = ()

    def optimizer(self, optimizer, **options):
        return optimizer

    def share(self, array):
        """The rows of `array` that this process trains on."""
        return array

    def gather(self, rows):
        """The rows of all processes."""
        return rows

    def predict(self, model, x, **options):
        return model.predict(x, verbose=0, **options)

    def evaluate(self, model, x, y, **options):
        return model.evaluate(x, y, verbose=0, return_dict=True, **options)


class Ranks:
    """The same on several ranks.

    Args:
        hvd: hvdext, initialised.
    """

    def __init__(self, hvd):
        self._hvd = hvd
        self.size = hvd.size()

    @property
    def callbacks(self):
        callbacks = self._hvd.callbacks
        return [callbacks.BroadcastGlobalVariablesCallback(0), callbacks.MetricAverageCallback()]

    def optimizer(self, optimizer, **options):
        return self._hvd.DistributedOptimizer(optimizer, **options)

    def share(self, array):
        """Every rank's batch is every n-th row of the one process's."""
        return array[self._hvd.rank() :: self.size]

    def gather(self, rows):
        return self._hvd.allgather(rows, gradient="sum")

    def predict(self, model, x, **options):
        return self._hvd.predict(model, x, verbose=0, gather="all", **options)

    def evaluate(self, model, x, y, **options):
        return self._hvd.evaluate(model, x, y, verbose=0, return_dict=True, **options)


def weights_of(*models: keras.Model):
    """What was trained, and what went along."""
    return [array for model in models for array in model.get_weights()]
