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


@pytest.mark.slow
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


METHODS = ("fit", "evaluate", "train_on_batch", "test_on_batch")


def count_steps(model) -> list[str]:
    """The steps that `model` begins from now on, by name."""
    begun = []

    def counted(name, step):
        def run(data):
            begun.append(name)
            return step(data)

        return run

    for name in ("train_step", "test_step"):
        setattr(model, name, counted(name, getattr(model, name)))
    return begun


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_ranks_are_compared_before_their_first_batch(method):
    x, y = cases.plain_data(1)

    def program(comm):
        model = make()
        begun = count_steps(model)
        errors = [error_of(lambda: getattr(model, method)(x + comm.rank, y))]
        errors.append(error_of(lambda: getattr(model, method)(x, y if comm.rank == 0 else None)))
        model.optimizer.learning_rate = 0.1 + comm.rank
        errors.append(error_of(lambda: getattr(model, method)(x, y)))
        model.optimizer.learning_rate = 0.1
        before = list(begun)
        getattr(model, method)(x, y)
        return errors, before, set(begun)

    step = "train_step" if method in ("fit", "train_on_batch") else "test_step"
    rules = [
        "ValueError: `x` must have the same batches in the same order on all ranks of a pipeline that are "
        "given one: shuffle with the same seed on all. Received: first batches that differ, by rank: ",
        "ValueError: `y` must be given on the rank of the last stage.",
        "learning rate: rank 0: [0.1",
    ]
    for errors, before, begun in run_ranks(2, program):
        assert before == []
        assert begun == {step}
        for error, rule in zip(errors, rules, strict=True):
            assert rule in error


@pytest.mark.parametrize("step", ["train_step", "test_step"])
def test_a_step_refuses_a_batch_that_nobody_has_compared(step):
    """What a release of Keras would do that reached the steps in a way of its own."""
    x, y = cases.plain_data(1)
    model = run_ranks(1, lambda comm: make())[0]
    with pytest.raises(RuntimeError, match="must be compared before their first batch"):
        getattr(model, step)((tf.constant(x), tf.constant(y)))


@pytest.mark.slow
def test_validation_is_told_from_an_evaluation_by_a_callback():
    x, y = cases.plain_data(2)

    def program(comm):
        model = make()
        mine = (x if comm.rank == 0 else None, y)
        losses = []
        evaluate = lambda *_: losses.append(model.evaluate(mine[0], y, verbose=0))  # noqa: E731
        callback = keras.callbacks.LambdaCallback(on_epoch_end=evaluate)
        fit = {"epochs": 2, "verbose": 0, "callbacks": [callback]}
        history = model.fit(*mine, validation_data=mine, **fit).history
        assert losses == pytest.approx(history["val_loss"])
        data = tf.data.Dataset.from_tensor_slices((x, y))
        begun = count_steps(model)
        other = {"validation_data": data.batch(4 + 4 * comm.rank)}
        return error_of(lambda: model.fit(*mine, **other, **fit)), begun, set(history)

    for error, begun, names in run_ranks(2, program):
        assert (
            "`x` must hold equally many batches on all ranks of a pipeline. Received: by rank: 8, 4" in error
        )
        assert begun == []
        assert names == {"loss", "val_loss"}


@pytest.mark.slow
def test_a_generator_is_trained_on_from_its_first_batch():
    x, y = cases.plain_data(2)

    def program(comm):
        batches = ((x[i : i + 8], y[i : i + 8]) for i in range(0, len(x), 8))
        model = make()
        model.fit(batches, verbose=0)
        other = make()
        other.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return cases.values(model), cases.values(other)

    for found, expected in run_ranks(2, program):
        for path, value in expected.items():
            np.testing.assert_allclose(found[path], value, rtol=0, atol=1e-6, err_msg=path)


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


@pytest.mark.slow
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
