"""Ranks that train apart end together, with the same weights: after an interrupt of one, and after epochs."""

from __future__ import annotations

import os
import signal

import keras
import numpy as np

from tests.multiprocess.programs.exchange_programs import Program

BATCHES, CHECK_EVERY, AT = 40, 4, 6  # the interrupt comes at the sixth batch, the next check after the eighth


def _data(rank):
    """The last batch, which has one row less, is never reached after an interrupt."""
    x = np.random.default_rng(rank).normal(size=((2 + rank) * BATCHES - 1, 2)).astype("float32")
    return x, x[:, :1] * (1 + rank)


def _make_model(optimizer):
    layers = [keras.layers.Dense(2), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    generator = np.random.default_rng(7)
    model.set_weights([np.abs(generator.normal(size=w.shape)) for w in model.weights])
    model.compile(optimizer, "mse", jit_compile=False)
    return model


class Recorder(keras.callbacks.Callback):
    """Interrupts its own process at a batch; keeps what the rank holds before the consensus."""

    def __init__(self, at=None):
        super().__init__()
        self._at = at
        self.batches = 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1
        if self.batches == self._at:
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_end(self, logs=None):
        self.before = _held(self.model)


def _held(model):
    momenta = [v for v in model.optimizer.variables if "momentum" in v.path]
    return [np.array(v) for v in [*model.weights, *momenta]]


def _fit(hvd, optimizer, rows, epochs, at):
    model = _make_model(optimizer)
    consensus = hvd.callbacks.ConsensusAveraging(check_every=CHECK_EVERY, verbose=0)
    recorder = Recorder(at)
    x, y = _data(hvd.rank())
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests
    try:
        model.fit(x, y, rows, epochs, shuffle=False, verbose=0, callbacks=[recorder, consensus])
        restored = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    return {
        "batches": recorder.batches,
        "before": recorder.before,
        "after": _held(model),
        "difference": hvd.largest_difference([*model.variables, *model.optimizer.variables]),
        "interrupted": consensus.interrupted,
        "restored": restored,
        "samples": consensus.report.samples,
        "distances": consensus.report.distances,
        "digest": consensus.report.digest,
    }


def run_interrupt(hvd):
    rank = hvd.rank()
    at = AT if rank == hvd.size() - 1 else None
    return _fit(hvd, keras.optimizers.SGD(0.05, momentum=0.9), 2 + rank, 2, at)


def check_interrupt(ranks):
    shares = np.arange(2, 2 + len(ranks)) / sum(range(2, 2 + len(ranks)))
    columns = list(zip(*(rank["before"] for rank in ranks), strict=True))
    assert len(columns) == 14
    for number, rank in enumerate(ranks):
        assert rank["batches"] == 8
        assert rank["interrupted"]
        assert rank["restored"]
        assert rank["samples"] == [8 * (2 + r) for r in range(len(ranks))]
        assert rank["difference"] == 0
        assert rank["digest"] == ranks[0]["digest"]
        assert rank["distances"][number] > 0.01
        for value, column in zip(rank["after"], columns, strict=True):
            expected = np.tensordot(shares, np.array(column, np.float64), 1)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)


def run_equal_already(hvd):
    """Gradients are shared, and each rank has statistics of its own."""
    return _fit(
        hvd, hvd.DistributedOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)), 2 + hvd.rank(), 1, None
    )


def check_equal_already(ranks):
    for rank in ranks:
        assert rank["batches"] == BATCHES
        assert not rank["interrupted"]
        assert rank["difference"] == 0
        trained = [v for i, v in enumerate(rank["before"]) if i not in (4, 5)]
        kept = [v for i, v in enumerate(rank["after"]) if i not in (4, 5)]
        for one, other in zip(trained, kept, strict=True):
            np.testing.assert_array_equal(one, other)
        statistics = [(r["before"][4], r["before"][5]) for r in ranks]
        assert statistics[0] != statistics[1]


PROGRAMS = {
    "consensus after an interrupt": Program(run_interrupt, check_interrupt, sizes=(2, 4)),
    "consensus of equal ranks": Program(run_equal_already, check_equal_already, sizes=(2,)),
}
