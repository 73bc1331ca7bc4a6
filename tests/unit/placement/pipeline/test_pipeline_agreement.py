"""Ranks of a pipeline that are given different things: an error on all of them, and no wrong numbers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.placement.pipeline.preflight import ShuffledAlike
from hvdext.testing import run_ranks
from tests.multiprocess.programs import pipeline_cases as cases


def make(**options):
    model = hvd.pipeline(cases.plain, hvd.plan(cases.plain, places=hvd.size()), 4)
    model.compile(**({"optimizer": "sgd", "loss": "mse"} | options))
    return model


def error_of(action) -> str:
    try:
        action()
    except (ValueError, RuntimeError, tf.errors.InvalidArgumentError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_batches_that_differ_after_the_first_fit():
    x, y = cases.plain_data(2)

    def data(seed, rows=8):
        whole = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(32, seed=seed).batch(rows, True)
        return whole.filter(lambda *_: True)  # the number of batches is not known

    def program(comm):
        model = make(metrics=["mae"])
        model.fit(data(0), epochs=2, verbose=0)
        before = cases.values(model)
        errors = [
            error_of(lambda: model.fit(data(comm.rank), epochs=2, verbose=0)),
            error_of(lambda: model.fit(data(0, 8 + 8 * comm.rank), verbose=0)),
            error_of(lambda: model.evaluate(data(comm.rank), verbose=0)),
        ]
        same = all(np.array_equal(value, before[path]) for path, value in cases.values(model).items())
        model.fit(data(1), verbose=0)  # and goes on
        return same, errors

    rules = ["`x` must have the same batches", "must have", "`x` must have the same batches"]
    for same, errors in run_ranks(2, program):
        assert same
        for error, rule in zip(errors, rules, strict=True):
            assert error.startswith("InvalidArgumentError")
            assert rule in error


def test_what_ranks_are_given_before_they_begin():
    x, y = cases.plain_data(1)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    checkpoint = keras.callbacks.ModelCheckpoint("never.keras")
    once = hvd.callbacks.AsOneProcess([checkpoint])
    best = hvd.callbacks.BestModelCheckpoint(filepath="never.keras")

    def program(comm):
        model, odd = make(), comm.rank == 1
        errors = [
            error_of(lambda: model.fit(x, None if odd else y, verbose=0)),
            error_of(lambda: model.fit(x, y, validation_data=(x, None if odd else y), verbose=0)),
            error_of(lambda: model.evaluate(x, None if odd else y, verbose=0)),
            error_of(lambda: model.fit(x[: 16 - odd], y[: 16 - odd], verbose=0)),
            error_of(lambda: model.fit(x, y, epochs=2 + odd, verbose=0)),
            error_of(lambda: model.fit(data.batch(4 + 4 * odd), verbose=0)),
            error_of(lambda: model.fit(data.batch(8), callbacks=[once] if odd else None, verbose=0)),
            error_of(lambda: model.fit(data.batch(8), callbacks=keras.callbacks.CallbackList([best]))),
            error_of(lambda: model.evaluate(data.batch(8), callbacks=once)),
        ]
        errors.append(error_of(lambda: model.fit(x, y, callbacks=[checkpoint] * odd, verbose=0)))
        # Data that Keras shuffles on one rank only.
        errors.append(error_of(lambda: model.fit(*((x, y) if odd else (data.batch(4), None)), verbose=0)))
        model.optimizer.learning_rate = 0.1 + odd
        errors.append(error_of(lambda: model.fit(x, y, verbose=0)))
        return errors

    first, second = run_ranks(2, program)
    assert first == second
    rules = [
        *["`y` must be given on the rank of the last stage"] * 3,
        "of which some have 15",
        "epochs: rank 0: (0, 2); rank 1: (0, 3)",
        "`x` must hold equally many batches on all ranks of a pipeline. Received: by rank: 4, 2",
        *["pass Keras' ModelCheckpoint itself"] * 3,
        "callbacks that save: rank 0: []; rank 1: ['ModelCheckpoint']",
        "shuffle: rank 0: (True, None); rank 1: (True, 'rows')",
        "learning rate: rank 0: [0.10000000149011612]; rank 1: [1.1",
    ]
    for error, rule in zip(first, rules, strict=True):
        assert error.startswith("ValueError")
        assert rule in error


def test_files_on_one_rank_alone():
    model = run_ranks(2, lambda comm: make())[0]
    for method in (model.save, model.save_weights, model.load_weights, model.load_checkpoint):
        with (
            use(SoloComm()),
            pytest.raises(RuntimeError, match="must be saved and loaded by all ranks together"),
        ):
            method("never.keras")


class Batches(keras.utils.PyDataset):
    """Sixteen batches, and which have been asked for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.x, self.y = cases.plain_data(16)
        self.asked = []

    def __len__(self):
        return 16

    def __getitem__(self, index):
        self.asked.append(index)
        rows = slice(index * cases.ROWS, (index + 1) * cases.ROWS)
        return self.x[rows], self.y[rows]


def test_a_python_data_set_is_shuffled_alike():
    def program(comm):
        data = Batches()
        make().fit(data, epochs=2, verbose=0)  # or batches that differ would be an error
        return data.asked

    asked = run_ranks(2, program)[0]
    assert asked[-16:] != sorted(asked[-16:])


@pytest.mark.parametrize("workers", [1, 2])
def test_orders_of_a_python_data_set(workers):
    def epochs(seed):
        shuffled, orders = ShuffledAlike(data, seed), []
        for _ in range(2):
            data.asked.clear()
            shuffled.on_epoch_begin()
            for index in range(shuffled.num_batches):
                shuffled[index]
            shuffled.on_epoch_end()
            orders.append(list(data.asked))
        return orders

    data = Batches(workers=workers)
    first, second = epochs(3)
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second
    assert epochs(3) == [first, second]
