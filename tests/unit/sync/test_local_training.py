"""Weights are exchanged between ranks that train on their own; gradients besides are refused."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.sync.when import Every
from hvdext.testing import run_ranks

PRESETS = [
    lambda: hvd.sync.DiLoCo(2),
    lambda: hvd.sync.LocalSGD(2),
    lambda: hvd.sync.SlowMo(2),
    lambda: hvd.sync.PartialSync("*/kernel"),
]


def _model(**options):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="out")])
    model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), **options), "mse")
    return model


def _refused(sync, size=2, **options):
    told = []

    def run(comm):
        try:
            sync().begin(_model(**options))
        except ValueError as error:
            told.append(str(error))

    run_ranks(size, run)
    return told


@pytest.mark.parametrize("sync", PRESETS, ids=["DiLoCo", "LocalSGD", "SlowMo", "PartialSync"])
def test_gradients_that_are_exchanged_as_well(sync):
    told = _refused(sync)
    assert len(told) == 2
    assert all("needs ranks that train on their own" in text for text in told)
    assert all("'sgd" in text for text in told)
    assert all("out/kernel" in text for text in told)


def test_a_group_within_the_ranks_that_exchange_gradients():
    assert len(_refused(lambda: hvd.sync.LocalSGD(2, whom=hvd.sync.Group(hvd.ProcessSet([0, 1]))))) == 2


def test_other_variables_or_other_ranks_may_exchange_gradients():
    biases = {"select": "*/bias"}
    assert _refused(lambda: hvd.sync.PartialSync("*/kernel"), **biases) == []
    assert len(_refused(lambda: hvd.sync.LocalSGD(2), **biases)) == 2

    def run(comm):
        pair = hvd.ProcessSet([0, 1] if comm.rank < 2 else [2, 3])
        hvd.sync.LocalSGD(2).begin(_model(process_set=pair))

    run_ranks(4, run)


@pytest.mark.parametrize(
    ("every", "warmup", "fragments", "turns"),
    [
        # worked out by hand: averages at warmup + every, warmup + 2 every, ...
        (4, 3, 1, {1: [0], 2: [0], 3: [0], 7: [0], 11: [0]}),
        (5, 0, 1, {5: [0], 10: [0]}),
        (3, 1, 1, {1: [0], 4: [0], 7: [0], 10: [0]}),
        (4, 1, 2, {1: [0, 1], 3: [0], 5: [1], 7: [0], 9: [1], 11: [0]}),
    ],
)
def test_the_first_interval_begins_after_the_warm_up(every, warmup, fragments, turns):
    schedule = Every(every, warmup_steps=warmup).schedule(fragments)
    assert {t: found for t in range(1, 12) if (found := schedule.due(t - 1, t))} == turns


def test_several_steps_at_once_over_the_end_of_the_warm_up():
    schedule = Every(4, warmup_steps=3).schedule(1)
    assert [schedule.due(t - 2, t) for t in (2, 4, 6, 8, 10, 12)] == [[0], [0], [], [0], [], [0]]


@pytest.mark.parametrize("warmup", [0, 2])
def test_weights_after_post_local_steps(warmup):
    """One weight, rank r moves by r + 1 at each step; averages by hand."""

    def run(comm):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        model.set_weights([np.zeros((1, 1))])
        sync = hvd.sync.PostLocalSGD(3, warmup)
        sync.begin(model)
        seen = []
        for _ in range(6):
            model.layers[0].kernel.assign_add([[float(comm.rank + 1)]])
            sync.step()
            seen.append(float(model.layers[0].kernel.numpy().item()))
        sync.end()
        return seen

    by_hand = {
        0: ([1, 2, 4.5, 5.5, 6.5, 9], [2, 4, 4.5, 6.5, 8.5, 9]),
        2: ([1.5, 3, 4, 5, 7.5, 8.5], [1.5, 3, 5, 7, 7.5, 9.5]),
    }
    assert tuple(run_ranks(2, run)) == by_hand[warmup]
