"""A training that normalizes by each rank's own batch says so."""

import warnings

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.gradients.training import told_by_fit
from hvdext.testing import run_ranks


def told(layer, trainable=True):
    """What is said when a `fit` on two ranks begins."""

    def one_rank(comm):
        inner = layer()
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), inner])
        model.set_weights([np.ones(weight.shape) for weight in model.get_weights()])
        inner.trainable = trainable
        model.compile(hvd.DistributedOptimizer("sgd", name="told"), "mse")
        teller = told_by_fit(model, None)
        teller.set_model(model)
        teller.on_train_begin()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_ranks(2, one_rank)
    return [str(warning.message) for warning in caught if "normalize by" in str(warning.message)]


def test_own_batches_are_told_once():
    (message,) = told(lambda: keras.layers.BatchNormalization(name="norm"))
    assert "['norm']" in message
    assert "hvd.SyncBatchNormalization" in message


@pytest.mark.parametrize(
    ("layer", "trainable"),
    [
        (lambda: keras.layers.BatchNormalization(name="norm"), False),
        (lambda: hvd.SyncBatchNormalization(name="norm"), True),
        (lambda: keras.layers.LayerNormalization(name="norm"), True),
    ],
)
def test_what_equals_one_process_is_not(layer, trainable):
    assert told(layer, trainable) == []
