"""What Keras does for a `PyDataset` is done for it on every rank: threads that load, and the epoch's ends."""

import threading
import time

import numpy as np
import pytest

import hvdext as hvd
from hvdext.inference.predict.sources.read_ahead import read_ahead
from hvdext.testing import run_ranks
from tests.unit.inference.predict.predict_kinds import BATCH, Indexed, numbers, small


class Counting(Indexed):
    """Notes the epoch's ends; in it rows are doubled."""

    factor = 1

    def __init__(self, *parts):
        super().__init__(*parts)
        self.ends = []

    def on_epoch_begin(self):
        self.ends.append("begin")
        self.factor = 2

    def on_epoch_end(self):
        self.ends.append("end")

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return (self.factor * found[0], found[1]) if isinstance(found, tuple) else self.factor * found


class Meeting(Indexed):
    """Three batches are loaded at the same time, or none."""

    def __init__(self, x):
        super().__init__(x)
        self.workers = 3
        self.barrier = threading.Barrier(3, timeout=20)

    def __getitem__(self, index):
        if index:  # what it is like is asked for before, once
            self.barrier.wait()
        return super().__getitem__(index)


def test_the_epoch_begins_and_ends_once_on_every_rank():
    x = numbers(dtype="float32")

    def program(comm):
        data = Counting(x)
        return hvd.predict(small(), data, gather="all", verbose=0), data.ends

    for predicted, ends in run_ranks(2, program):
        assert ends == ["begin", "end"]
        np.testing.assert_array_equal(predicted, small().predict(2 * x, BATCH, verbose=0))


def test_the_epoch_of_evaluate():
    x, y = numbers(dtype="float32"), numbers(width=3, dtype="float32")

    def program(comm):
        data = Counting(x, y)
        return hvd.evaluate(_compiled(), data, verbose=0), data.ends

    expected = _compiled().evaluate(2 * x, y, BATCH, verbose=0)
    for loss, ends in run_ranks(2, program):
        assert ends == ["begin", "end"]
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def _compiled():
    model = small()
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_epoch_end"])
def test_a_hook_that_fails_on_one_rank(hook):
    def fail():
        raise OSError("no such file")

    def program(comm):
        data = Counting(numbers(dtype="float32"))
        if comm.rank == 1:
            setattr(data, hook, fail)
        with pytest.raises(OSError) as caught:
            hvd.predict(small(), data, verbose=0)
        return str(caught.value)

    first, second = run_ranks(2, program)
    assert first == second
    assert "rank 1: " in first
    assert "no such file" in first


def test_workers_load_at_the_same_time():
    x = numbers(10 * BATCH, dtype="float32")
    data = Meeting(x)
    found = list(read_ahead(lambda number: data[number], range(1, 10), workers=3, ahead=9))
    np.testing.assert_array_equal(np.concatenate(found), x[BATCH:])
    data.barrier = threading.Barrier(3, timeout=0.1)
    with pytest.raises(threading.BrokenBarrierError):
        list(read_ahead(lambda number: data[number], range(1, 10)))


class Busy(Indexed):
    """Notes how many batches were loaded at the same time."""

    def __init__(self, x, workers):
        super().__init__(x)
        self.workers = workers
        self.lock = threading.Lock()
        self.at_once = self.most = 0

    def __getitem__(self, index):
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(0.01)
        with self.lock:
            self.at_once -= 1
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [1, 4])
def test_predict_uses_the_workers(workers):
    x = numbers(80 * BATCH, dtype="float32")

    def program(comm):
        data = Busy(x, workers)
        return hvd.predict(small(), data, gather="all", verbose=0), data.most

    for predicted, most in run_ranks(2, program):
        np.testing.assert_array_equal(predicted, small().predict(x, BATCH, verbose=0))
        assert (most > 1) == (workers > 1)


def test_who_stops_early_leaves_nothing_to_load():
    loaded = []
    go_on = threading.Event()

    def load(number):
        loaded.append(number)
        if number:
            go_on.wait(20)
        return number

    batches = read_ahead(load, range(10), workers=2, ahead=8)
    assert next(batches) == 0
    batches.close()
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("hvdext-reader"):
            thread.join(5)
    assert len(loaded) <= 3
