"""Data shared by load: each sample once per epoch over all ranks, less of them for a slow rank."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext import data
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.testing import run_ranks

SAMPLES, BATCH = 43, 4  # 11 batches, the last one of 3


def _share(**kwargs):
    x = np.arange(SAMPLES, dtype="float32")[:, None]
    return data.shared_by_load(x, -x, **({"batch_size": BATCH} | kwargs))


def _samples(batch):
    x, y = batch
    np.testing.assert_array_equal(y, -x)
    return x.numpy().ravel().astype(int).tolist()


def _epochs_of_three_ranks(comm):
    """Three epochs; the last rank sleeps after each batch."""
    with _share(seed=5) as shared:
        epochs = []
        for _ in range(3):
            batches = []
            for batch in shared:
                batches.append(_samples(batch))
                time.sleep(0.05 if comm.rank == 2 else 0.002)
            epochs.append(batches)
        return epochs, shared.batches, shared.samples, shared.waited


@pytest.fixture(scope="module")
def three_ranks():
    return run_ranks(3, _epochs_of_three_ranks)


@pytest.mark.slow
def test_every_sample_goes_to_one_rank_in_each_epoch(three_ranks):
    for epoch in range(3):
        dealt = [sample for epochs, *_ in three_ranks for batch in epochs[epoch] for sample in batch]
        assert sorted(dealt) == list(range(SAMPLES))
    assert sum(samples for _, _, samples, _ in three_ranks) == 3 * SAMPLES
    assert all(waited > 0 for *_, waited in three_ranks)


def test_batches_are_those_of_the_order_that_all_ranks_know(three_ranks):
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(SAMPLES)
        expected = [order[start : start + BATCH].tolist() for start in range(0, SAMPLES, BATCH)]
        dealt = [batch for epochs, *_ in three_ranks for batch in epochs[epoch]]
        assert sorted(dealt) == sorted(expected)


def test_a_slow_rank_gets_less(three_ranks):
    batches = [found for _, found, _, _ in three_ranks]
    assert sum(batches) == 3 * 11
    assert 1 <= batches[2] < min(batches[:2])


def test_one_process_gets_everything():
    with use(SoloComm()), _share(shuffle=False) as shared:
        for _ in range(2):
            assert [sample for batch in shared for sample in _samples(batch)] == list(range(SAMPLES))
        assert int(shared.cardinality()) == shared.steps_per_epoch == 11
        assert shared.batches == 22


def test_what_a_pass_has_left_comes_in_the_next():
    with use(SoloComm()), _share(shuffle=False) as shared:
        first = [_samples(batch) for batch in shared.take(2)]
        second = [_samples(batch) for batch in shared]
        assert [len(first), len(second)] == [2, 20]
        assert sorted(sample for batch in first + second for sample in batch) == sorted(
            2 * list(range(SAMPLES))
        )


def test_a_resumed_training_gets_the_epochs_that_follow(three_ranks):
    def resume(comm):
        with _share(seed=5, initial_epoch=2) as shared:
            return [_samples(batch) for batch in shared]

    again = [batch for batches in run_ranks(2, resume) for batch in batches]
    before = [batch for epochs, *_ in three_ranks for batch in epochs[2]]
    assert sorted(again) == sorted(before)


class _Fit(keras.Model):
    """Trains nothing and counts its steps."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def train_step(self, batch):
        self.rows.append(len(batch[0]))
        return {"loss": 0.0}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_fit_takes_whole_epochs_though_their_lengths_differ():
    """Keras would stop each epoch where the first one ended; rank 1 makes most steps in the second."""

    def train(comm):
        pace = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: setattr(model, "epoch", epoch),
            on_train_batch_end=lambda batch, logs: time.sleep(0.05 if model.epoch == comm.rank else 0.0),
        )
        model = _Fit()
        model.compile(run_eagerly=True)
        with _share() as shared:
            model.fit(shared, epochs=2, shuffle=False, verbose=0, callbacks=[pace])
            return shared.samples, sum(model.rows)

    ranks = run_ranks(2, train)
    assert all(dealt == trained for dealt, trained in ranks)
    assert sum(trained for _, trained in ranks) == 2 * SAMPLES


def test_ranks_that_differ_get_one_error_on_all():
    def differ(comm):
        with pytest.raises(ValueError, match=r"batch_size: rank 0: 2; rank 1: 3"):
            _share(batch_size=2 + comm.rank)

    run_ranks(2, differ)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1. Received: batch_size=0"),
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1"),
        ({"timeout": 0}, "`timeout` must be a number above 0. Received: timeout=0"),
        ({"batch_size": 43}, "`x` must hold at least as many batches as there are ranks. Received: 43"),
    ],
)
def test_wrong_arguments(arguments, message):
    def refuse(comm):
        with pytest.raises(ValueError) as caught:
            _share(**arguments)
        return str(caught.value)

    assert all(message in text for text in run_ranks(2, refuse))


def test_wrong_keyword():
    with pytest.raises(TypeError, match="Did you mean `batch_size`"):
        data.shared_by_load(np.zeros(4), batchsize=2)


def test_a_server_that_does_not_start_is_an_error_on_every_rank(monkeypatch):
    def fail(host, start):
        raise OSError("no port is free")

    def refuse(comm):
        with pytest.raises(OSError, match=r"Rank 0 could not start .*:\n  rank 0: OSError: no port is free"):
            _share()

    monkeypatch.setattr("hvdext.data.by_load._started", fail)
    run_ranks(2, refuse)


def test_a_batch_that_never_comes_is_an_error_after_the_timeout():
    with use(SoloComm()):
        shared = _share(timeout=0.2)
        shared._numbers.source.next = lambda: time.sleep(30)
        with pytest.raises(tf.errors.OpError, match=r"No batch has come within 0\.2 s"):
            list(shared)


def test_closed_data_say_so():
    with use(SoloComm()):
        with _share() as shared:
            pass
        shared.close()
        with pytest.raises(tf.errors.OpError, match="are closed"):
            list(shared)
