"""Consensus after training, with threads as ranks; what must come out is worked out by NumPy."""

import os
import re
import signal
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.callbacks import ConsensusAveraging
from hvdext.collectives.digest import check_equal, digest
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.common.signals import GracefulStop
from hvdext.consensus import batch_statistics
from hvdext.keras_tools.sample_counter import SampleCounter
from hvdext.sync.attachment import attach, attached, detach
from hvdext.testing import run_ranks


def _values(rank, shapes, seed=0):
    generator = np.random.default_rng([rank, seed])
    return [generator.normal(size=shape).astype("float32") for shape in shapes]


def _model(rank, optimizer=None, seed=0):
    """Weights, slots and statistics that differ from rank to rank; rank r has made 3 + r updates."""
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(3, name="dense"),
            keras.layers.BatchNormalization(name="normalisation"),
            keras.layers.Dropout(0.5, seed=rank, name="dropout"),
        ]
    )
    model.compile(optimizer or keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    variables = [*model.weights, *model.optimizer.variables]
    for variable, value in zip(variables, _values(rank, [v.shape for v in variables], seed), strict=True):
        if "float" in variable.dtype and "learning_rate" not in variable.path:
            variable.assign(np.abs(value) if "variance" in variable.path else value)
    model.optimizer.iterations.assign(3 + rank)
    return model


def _numbers(variables):
    return [np.array(tf.convert_to_tensor(v)) for v in variables]


def _slots(model):
    return [v for v in model.optimizer.variables if "dense" in v.path or "normalisation" in v.path]


def _weighted(columns, shares):
    return [np.tensordot(shares, np.array(c, np.float64), 1).astype("float32") for c in columns]


def _assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def _quiet(**options):
    return ConsensusAveraging(verbose=0, **options)


# -- what all ranks end with ---------------------------------------------------------------------------


WAYS = {
    "samples": ({}, [10, 20, 50], [1 / 8, 2 / 8, 5 / 8]),
    "none on one rank": ({}, [3, 0, 1], [3 / 4, 0, 1 / 4]),
    "none at all": ({}, [0, 0, 0], [1 / 3] * 3),
    "all alike": ({"weight_by": None}, [None] * 3, [1 / 3] * 3),
    "best": ({"take": "best", "score": lambda m: [0.5, np.nan, 0.2][hvd.rank()]}, [1, 2, 3], [0, 0, 1]),
    "best of equals": ({"take": "best", "score": lambda m: -float(hvd.rank() > 0)}, [1, 2, 3], [0, 1, 0]),
}


@pytest.mark.slow
def test_all_ranks_end_with():
    def one_rank(comm):
        model, results = _model(comm.rank), {}
        start, seeds = _numbers(model.variables), _numbers(model.layers[2].variables)
        slots = _numbers(model.optimizer.variables)
        for name, (options, samples, _) in WAYS.items():
            for variable, value in zip(model.variables, start, strict=True):
                variable.assign(value)
            for variable, value in zip(model.optimizer.variables, slots, strict=True):
                variable.assign(value)
            before = _numbers(model.weights), _numbers(_slots(model))
            report = _quiet(**options).unify(model, samples[comm.rank])
            _assert_equal(_numbers(model.layers[2].variables), seeds)
            after = _numbers(model.weights), _numbers(_slots(model))
            found = digest([*model.weights, *model.optimizer.variables])
            results[name] = before, after, report, int(model.optimizer.iterations), found
        return results

    ranks = run_ranks(3, one_rank)
    for name, (_, samples, shares) in WAYS.items():
        _check_way([rank[name] for rank in ranks], samples, shares)


def _check_way(ranks, samples, shares):
    weights, slots = (list(zip(*(rank[0][i] for rank in ranks), strict=True)) for i in (0, 1))
    expected, expected_slots = _weighted(weights, shares), _weighted(slots, shares)
    assert [len(expected), len(expected_slots)] == [6, 8]
    distances = [
        np.sqrt(sum(np.sum((own - common) ** 2) for own, common in zip(rank[0][0], expected, strict=True)))
        for rank in ranks
    ]
    for _, after, report, iterations, found in ranks:
        for one, other in zip([*after[0], *after[1]], [*expected, *expected_slots], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        assert iterations == max(3 + i for i, share in enumerate(shares) if share)
        np.testing.assert_allclose(report.shares, shares)
        np.testing.assert_allclose(report.distances, distances, rtol=1e-5)
        np.testing.assert_allclose(report.largest_distance, max(distances), rtol=1e-5)
        np.testing.assert_allclose(report.mean_distance, np.mean(distances), rtol=1e-5)
        assert report.digest == found == ranks[0][4]
        assert report.samples == (None if samples[0] is None else tuple(samples))


def test_probe_picks_whom_one_process_would_pick():
    x, y = _values(0, [(8, 2), (8, 1)], seed=1)
    kernels = [np.float32([[3.0], [-1.0]]), np.float32([[0.5], [-1.0]])]
    losses = [np.mean((x @ kernel - y) ** 2) for kernel in kernels]
    assert losses[1] < losses[0]

    def one_rank(comm):
        model = _linear()
        model.layers[0].kernel.assign(kernels[comm.rank])
        model.optimizer.iterations.assign(comm.rank)
        callback = _quiet(take="best", probe=(x, y), evaluate=(x, y), optimizer_state=False)
        return callback.unify(model), model.layers[0].kernel.numpy(), int(model.optimizer.iterations)

    for rank, (report, kernel, iterations) in enumerate(run_ranks(2, one_rank)):
        np.testing.assert_allclose(report.scores, losses, rtol=1e-5)
        np.testing.assert_allclose([m["loss"] for m in report.metrics_before], losses, rtol=1e-5)
        np.testing.assert_allclose([m["loss"] for m in report.metrics_after], [losses[1]] * 2, rtol=1e-5)
        np.testing.assert_array_equal(kernel, kernels[1])
        assert iterations == rank  # left alone


@pytest.mark.parametrize("optimizer_state", [True, False])
def test_a_score_that_trains_changes_nothing(optimizer_state):
    def one_rank(comm):
        model = _linear()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        variables = [*model.variables, *model.optimizer.variables]
        before = _numbers(variables)
        batch = np.ones((2, 2), "float32"), np.full((2, 1), 5.0, "float32")
        options = {"score": lambda m: m.train_on_batch(*batch), "optimizer_state": optimizer_state}
        _quiet(take="best", **options).unify(model)
        return before, _numbers(variables)

    for before, after in run_ranks(2, one_rank):
        _assert_equal(before, after)


def test_mixed_precision_keeps_a_loss_scale_that_is_a_power_of_two():
    def one_rank(comm):
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1))
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="mixed_float16")])
        model.compile(optimizer, "mse", jit_compile=False)
        optimizer.build(model.trainable_variables)
        optimizer.dynamic_scale.assign([1024.0, 256.0][comm.rank])
        optimizer.inner_optimizer.iterations.assign(comm.rank)
        model.layers[0].kernel.assign([[comm.rank], [1.0]])
        _quiet(weight_by=None).unify(model)
        scale, kernel = float(optimizer.dynamic_scale), model.layers[0].kernel.numpy()
        return scale, int(optimizer.inner_optimizer.iterations), kernel.ravel().tolist()

    assert run_ranks(2, one_rank) == [(256.0, 1, [0.5, 1.0])] * 2


def test_last_epochs():
    """Three epochs on one rank, two on the other; the last two of each count."""

    def one_rank(comm):
        model, callback = _model(comm.rank), _quiet(last_epochs=2, weight_by=None)
        callback.set_model(model)
        callback.on_train_begin()
        brought = []
        for epoch in range(3 - comm.rank):
            callback.on_epoch_begin(epoch)
            model.set_weights(_numbers(_model(comm.rank, seed=epoch).weights))
            brought.append(_numbers(model.weights))
            callback.on_epoch_end(epoch)
        callback.on_train_end()
        return brought[-2:], _numbers(model.weights)

    ranks = run_ranks(2, one_rank)
    expected = [np.mean(column, 0) for column in zip(*ranks[0][0], *ranks[1][0], strict=True)]
    for _, weights in ranks:
        for one, other in zip(weights, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_reestimated_batch_norm():
    batches = {rank: _values(rank, [(4, 2)] * 3, seed=2) for rank in range(2)}

    def one_rank(comm):
        model = _model(comm.rank)
        model.layers[1].momentum = 0.9
        kept = _numbers(model.layers[2].variables)
        data = tf.data.Dataset.from_tensor_slices((np.stack(batches[comm.rank]), np.zeros(3)))
        callback = _quiet(weight_by=None, reestimate_batch_norm=(data, 2))  # of three
        callback.unify(model)
        assert model.layers[1].momentum == 0.9
        layer = model.layers[1]
        found = [*_numbers(model.layers[0].weights), layer.moving_mean.numpy(), layer.moving_variance.numpy()]
        return found, kept

    ranks = run_ranks(2, one_rank)
    kernel, bias, mean, variance = ranks[0][0]
    outputs = [x @ kernel + bias for rank in range(2) for x in batches[rank][:2]]
    np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in outputs], 0), rtol=1e-4)
    np.testing.assert_allclose(variance, np.mean([x.var(0) for x in outputs], 0), rtol=1e-4)
    _assert_equal(ranks[1][0], ranks[0][0])


def test_forward_passes_leave_other_variables_alone():
    class Counting(keras.layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            return x

    layer = Counting()
    model = keras.Sequential([keras.Input((2,)), layer, keras.layers.BatchNormalization()])
    batch_statistics.reestimate(model, [np.float32([[1.0, 2.0], [3.0, 6.0]])])
    np.testing.assert_allclose(model.layers[1].moving_mean, [2.0, 4.0])
    assert float(layer.calls) == 0


def test_one_process_keeps_its_weights():
    with use(SoloComm()):
        model = _model(0)
        before = _numbers(model.weights)
        report = ConsensusAveraging().unify(model, 4)
        _assert_equal(_numbers(model.weights), before)
        assert report.shares == (1.0,)
        assert report.distances == (0.0,)


# -- what must not spread, and what must not hang ------------------------------------------------------


def _with_nan(comm, *ranks):
    model = _model(comm.rank)
    if comm.rank in ranks:
        model.layers[0].kernel.assign(np.full((2, 3), np.nan))
    return model


def test_nonfinite_weights_are_left_out():
    def one_rank(comm):
        model = _with_nan(comm, 1)
        report = _quiet(on_nonfinite="skip_rank").unify(model, 10)
        return report, model.layers[0].kernel.numpy()

    expected = np.mean([_model(rank).layers[0].kernel.numpy() for rank in (0, 2)], 0)
    with pytest.warns(UserWarning, match="rank 1: .*dense/kernel") as caught:
        ranks = run_ranks(3, one_rank)
    assert len([w for w in caught if "not finite" in str(w.message)]) == 3
    for report, kernel in ranks:
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)
        assert report.skipped == (1,)
        assert report.shares == (0.5, 0.0, 0.5)
        assert np.isnan(report.distances[1])
        assert np.isfinite(report.largest_distance)


def _scored(comm):
    def score(model):
        if comm.rank == 1:
            raise KeyError("no such data")
        return 0.5

    _quiet(take="best", score=score).unify(_linear())


ERRORS = {
    r"ValueError: .*rank 1: .*dense/kernel.*skip_rank": lambda c: _quiet().unify(_with_nan(c, 1), 1),
    r"ValueError: No rank's weights are finite: rank 0: .*rank 1: ": lambda c: _quiet(
        on_nonfinite="skip_rank"
    ).unify(_with_nan(c, 0, 1), 1),
    r"ValueError: No rank's score is finite": lambda c: _quiet(take="best", score=lambda m: np.inf).unify(
        _linear()
    ),
    r"ValueError: `samples` must be given": lambda c: _quiet().unify(_linear()),
    r"ValueError: `samples` must be a whole number.*samples=-1": lambda c: _quiet().unify(_linear(), -1),
    r"MismatchError: .*disagree(.*\n)*.*rank 1: `samples` must": lambda c: _quiet().unify(
        _linear(), 1 - 2 * c.rank
    ),
    r"ValueError: The model must be built": lambda c: _quiet().unify(
        keras.Sequential([keras.layers.Dense(1)]), 1
    ),
    r"MismatchError: .*disagree(.*\n)*.*weight_by: rank 0: None; rank 1: 'samples'": lambda c: _quiet(
        weight_by=[None, "samples"][c.rank]
    ).unify(_linear(), 1),
    r"ValueError: .*(\n.*)*must hold 2 batches.*with 1": lambda c: _quiet(
        reestimate_batch_norm=([[1.0]], 2)
    ).unify(_linear(), 1),
    r"RuntimeError: .*\n *rank 1: KeyError: 'no such data'": _scored,
    r"RuntimeError: The ranks hold different weights.*rank 0: .*rank 1: ": lambda c: check_equal(
        c, [tf.Variable([1.0, float(c.rank)])], "hvdext.test"
    ),
}


def test_errors_are_the_same_on_all_ranks():
    def one_rank(comm):
        found = []
        for action in ERRORS.values():
            with pytest.raises((ValueError, RuntimeError)) as error:
                action(comm)
            found.append(f"{error.type.__name__}: {error.value}")
        return found

    first, second = run_ranks(2, one_rank)
    assert first == second
    for pattern, message in zip(ERRORS, first, strict=True):
        assert re.search(pattern, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"take": "median"}, "`take` must be one of 'mean', 'best'. Received: take='median'"),
        ({"weight_by": "steps"}, "`weight_by`.*'steps'"),
        ({"last_epochs": 0}, "`last_epochs` must be an integer of at least 1. Received: last_epochs=0"),
        ({"check_every": 2.5}, "`check_every`.*2.5"),
        ({"on_nonfinite": "ignore"}, "`on_nonfinite`.*'ignore'"),
        ({"take": "best"}, "`probe` or `score` must be given"),
        ({"score": print}, "neither otherwise.*'mean' with score"),
        ({"take": "best", "score": 1.0}, "`score` must be a function"),
        ({"take": "best", "probe": np.zeros(3)}, "`probe` must be a batch.*ndarray"),
        ({"reestimate_batch_norm": 5}, r"`reestimate_batch_norm` must be \(data"),
        ({"reestimate_batch_norm": ([], 0)}, "`reestimate_batch_norm` must be .*at least 1"),
        ({"take_": "mean"}, "Did you mean `take`"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ConsensusAveraging(**arguments)


# -- ending together -----------------------------------------------------------------------------------


class At(keras.callbacks.Callback):
    """Does something at one batch; counts batches and remembers what the model holds at the end."""

    def __init__(self, batch, action):
        super().__init__()
        self._batch, self._action = batch, action
        self.trained = 0

    def on_train_batch_end(self, batch, logs=None):
        self.trained += 1
        if self.trained == self._batch:
            self._action(self)

    def on_train_end(self, logs=None):
        self.weights = _numbers(self.model.weights)


def _stop(callback):
    callback.model.stop_training = True


def _linear(rank=0, **options):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[1.0 + rank], [-1.0]])
    model.compile(keras.optimizers.SGD(0.1), "mse", **({"jit_compile": False} | options))
    return model


def _fit(comm, batches, epochs, make, consensus_last=True):
    """Trains ranks with data of their own; returns what `At` saw, the callback and the final weights."""
    model, consensus = _linear(comm.rank), _quiet(check_every=4)
    x, y = _values(comm.rank, [(2 * batches - 1, 2), (2 * batches - 1, 1)], seed=3)
    others = make(consensus)
    callbacks = [*others, consensus] if consensus_last else [consensus, *others]
    model.fit(x, y, 2, epochs=epochs, verbose=0, callbacks=callbacks)
    return others[0].trained, others[0].weights, consensus, model.layers[0].kernel.numpy()


def _check_mean(ranks):
    """The last batch of an epoch has one sample, the others two."""
    samples = [consensus.report.samples for _, _, consensus, _ in ranks]
    assert samples == [samples[0]] * len(ranks)
    columns = zip(*(weights for _, weights, _, _ in ranks), strict=True)
    (expected,) = _weighted(columns, np.array(samples[0]) / sum(samples[0]))
    for *_, kernel in ranks:
        np.testing.assert_allclose(kernel, expected, rtol=1e-6)
        np.testing.assert_array_equal(kernel, ranks[0][3])
    return samples[0]


def test_a_wish_to_stop_is_held_back_until_all_stop():
    ranks = run_ranks(2, lambda c: _fit(c, 10, 2, lambda _: [At(5 if c.rank else 0, _stop)]))
    assert [trained for trained, *_ in ranks] == [8, 8]
    assert _check_mean(ranks) == (16, 16)
    assert [consensus.interrupted for _, _, consensus, _ in ranks] == [False, False]


def test_an_interrupt_ends_all_ranks():
    def one_rank(comm):
        return _fit(comm, 10, 3, lambda own: [At(13 if comm.rank else 0, lambda _: own.interrupt())])

    ranks = run_ranks(2, one_rank)
    assert [trained for trained, *_ in ranks] == [14, 14]
    assert _check_mean(ranks) == (19 + 8, 19 + 8)
    assert [consensus.interrupted for _, _, consensus, _ in ranks] == [True, True]


def test_ranks_with_other_numbers_of_batches_and_epochs_end_when_they_have_trained():
    def one_rank(comm):
        return _fit(comm, [9, 3][comm.rank], [3, 2][comm.rank], lambda _: [At(0, _stop)])

    ranks = run_ranks(2, one_rank)
    assert [trained for trained, *_ in ranks] == [27, 6]
    assert _check_mean(ranks) == (3 * 17, 2 * 5)


class StopAfter(keras.callbacks.Callback):
    """Early stopping on one rank."""

    def __init__(self, epoch):
        super().__init__()
        self._epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self._epoch:
            self.model.stop_training = True


@pytest.mark.slow
@pytest.mark.parametrize("consensus_last", [True, False])
def test_early_stopping_on_one_rank(consensus_last):
    def one_rank(comm):
        others = [At(0, _stop), StopAfter(1 if comm.rank else None)]
        return _fit(comm, 6, 4, lambda _: others, consensus_last)

    ranks = run_ranks(2, one_rank)
    # A callback behind this one stops its rank before the others know: they end at their next check.
    assert [trained for trained, *_ in ranks] == ([12, 12] if consensus_last else [16, 12])
    if consensus_last:
        _check_mean(ranks)
    np.testing.assert_array_equal(ranks[0][3], ranks[1][3])


@pytest.mark.slow
def test_ranks_with_equal_weights_change_nothing():
    def one_rank(comm):
        model, consensus = _linear(), _quiet()
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
        x, y = _values(comm.rank, [(4, 2), (4, 1)], seed=4)
        seen = At(0, _stop)
        model.fit(x, y, 2, verbose=0, callbacks=[seen, consensus])
        _assert_equal(_numbers(model.weights), seen.weights)
        return consensus.report

    for report in run_ranks(2, one_rank):
        assert report.distances == (0.0, 0.0)


class Sync:
    """What this callback needs of a `ParameterSync`."""

    def __init__(self, is_asynchronous, stop_requested=False):
        self.is_asynchronous = is_asynchronous
        self.stop_requested = stop_requested
        self.calls = []

    def request_stop(self):
        self.calls.append("request_stop")

    def end(self):
        self.calls.append("end")


def test_asynchronous_ranks_meet_at_the_end_only():
    """Rank 0 is interrupted at its second batch, rank 1 is asked to stop by the exchange at its first."""

    def one_rank(comm):
        model, consensus = _linear(comm.rank), _quiet(check_every=1)
        sync = Sync(True, stop_requested=comm.rank == 1)
        attach(model, sync)
        consensus.set_model(model)
        consensus.on_train_begin()
        before = comm.traffic()["consensus"].calls if "consensus" in comm.traffic() else 0
        for batch in range(2 - comm.rank):
            assert not model.stop_training
            if comm.rank == 0 and batch == 1:
                consensus.interrupt()
            consensus.on_train_batch_end(batch)
        assert model.stop_training
        consensus.on_epoch_end(0)
        met = comm.traffic()["consensus"].calls if "consensus" in comm.traffic() else 0
        consensus.on_train_end()
        return before, met, sync.calls, consensus.interrupted, model.layers[0].kernel.numpy().tolist()

    ranks = run_ranks(2, one_rank)
    for before, met, calls, interrupted, kernel in ranks:
        assert before == met == 0
        assert calls[0] == "request_stop"
        assert calls[-1] == "end"
        assert interrupted
        assert kernel == [[1.5], [-1.0]]


def test_attached_syncs_are_ended_before_averaging():
    class Moving(Sync):
        def end(self):
            model.layers[0].kernel.assign([[7.0], [7.0]])

    with use(SoloComm()):
        model, consensus = _linear(), _quiet()
        attach(model, Moving(False))
        model.fit(np.ones((2, 2)), np.ones(2), verbose=0, callbacks=[consensus])
    assert model.layers[0].kernel.numpy().tolist() == [[7.0], [7.0]]


def test_attached(tmp_path):
    model, first, second = _linear(), Sync(False), Sync(False)
    assert attached(model) == []
    for sync in (first, second, first):
        attach(model, sync)
    assert attached(model) == [first, second]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    _assert_equal(_numbers(loaded.weights), _numbers(model.weights))
    assert attached(loaded) == []
    detach(model, first)
    detach(model, first)
    assert attached(model) == [second]


# -- signals -------------------------------------------------------------------------------------------


@pytest.fixture
def usual_signals():
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


def test_the_first_signal_asks_and_the_second_ends(usual_signals, capfd):
    interrupts = GracefulStop("training ends soon")
    interrupts.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupts.requested
    assert capfd.readouterr().err == "SIGTERM: training ends soon\n"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_after_training_has_its_usual_effect(usual_signals):
    def dying_fit():
        interrupts.install()
        raise MemoryError

    interrupts = GracefulStop("")
    with pytest.raises(MemoryError):
        dying_fit()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert not interrupts.requested
    interrupts.install()
    interrupts.uninstall()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_stay_as_they_are(usual_signals):
    interrupts = GracefulStop("")
    thread = threading.Thread(target=interrupts.install)
    thread.start()
    thread.join()
    interrupts.uninstall()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted_fit_of_one_process(usual_signals):
    with use(SoloComm()):
        model, consensus = _linear(), _quiet()
        seen = At(3, lambda _: os.kill(os.getpid(), signal.SIGINT))
        model.fit(np.ones((20, 2)), np.ones(20), 2, verbose=0, callbacks=[seen, consensus])
    assert seen.trained == 3
    assert consensus.interrupted
    assert consensus.report.samples == (6,)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- samples -------------------------------------------------------------------------------------------


def _arrays(n, wrap=lambda x: x):
    return {"x": wrap(np.ones((n, 2), "float32")), "y": np.ones((n, 1), "float32"), "batch_size": 4}


def _of_unknown_length(n, drop):
    """Keras finds the end by one step more; with `drop`, the shape of a batch is known beforehand."""
    data = tf.data.Dataset.from_tensor_slices((np.ones((n, 2), "float32"), np.ones((n, 1), "float32")))
    return {"x": data.filter(lambda x, y: True).batch(4, drop_remainder=drop)}


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs["a"] + inputs["b"])


@pytest.mark.parametrize(
    ("data", "options", "expected"),
    [
        (_arrays(10), {}, 10),
        (_arrays(10), {"run_eagerly": True}, 10),
        (_arrays(10), {"steps_per_execution": 2}, 10),
        (_of_unknown_length(10, drop=True), {}, 8),
        (_of_unknown_length(10, drop=False), {"steps_per_execution": 3}, 10),
        (_of_unknown_length(10, drop=True), {"steps_per_execution": 2}, 8),
        (_arrays(6, lambda x: {"a": x, "b": x}), {}, 6),
        (_arrays(5), {"jit_compile": True}, 5),
    ],
    ids=["arrays", "eager", "3 of 2", "unknown", "unknown, 3 at once", "unknown, 2 at once", "dict", "XLA"],
)
@pytest.mark.slow
def test_samples_are_counted(data, options, expected):
    if isinstance(data["x"], dict):
        model = TwoInputs()
        model.compile("sgd", "mse", jit_compile=False)
    else:
        model = _linear(**options)
    counter = SampleCounter.of(model)
    counter.acquire()
    model.fit(**data, epochs=2, verbose=0)
    assert counter.total() == 2 * expected


def test_users_share_a_counter_that_leaves_nothing_behind():
    model, data = _linear(), _arrays(6)
    model.fit(**data, verbose=0)  # traced without it
    one, other = SampleCounter.of(model), SampleCounter.of(model)
    assert one is other
    one.acquire()
    other.acquire()
    model.fit(**data, verbose=0)
    assert one.total() == 6
    one.release()
    model.fit(**data, verbose=0)
    assert other.total() == 12
    other.release()
    assert "train_step" not in vars(model)
    made = model.train_function
    one.acquire()
    before = one.total()
    model.fit(**data, verbose=0)
    assert model.train_function is made  # not traced again
    assert one.total() - before == 6


def test_a_step_that_was_wrapped_before_and_after_counts_once():
    model, calls = _linear(), []
    plain = model.train_step
    model.train_step = lambda data: calls.append("inner") or plain(data)
    mine, counter = model.train_step, SampleCounter.of(model)
    counter.acquire()
    counting = model.train_step
    model.train_step = lambda data: calls.append("outer") or counting(data)
    counter.release()  # cannot take off what is inside
    counter.acquire()
    model.fit(**_arrays(6), verbose=0)
    assert counter.total() == 6
    assert {"inner", "outer"} <= set(calls)

    model.train_step = mine
    SampleCounter.of(model)


def test_a_fit_that_died_leaves_the_counter_to_the_next():
    def fail(_):
        raise MemoryError

    with use(SoloComm()):
        model, consensus = _linear(), _quiet()
        with pytest.raises(MemoryError):
            model.fit(**_arrays(8), verbose=0, callbacks=[At(1, fail), consensus])
        model.fit(**_arrays(8), verbose=0, callbacks=[consensus])
        assert consensus.report.samples == (8,)
        assert "train_step" not in vars(model)
        model.evaluate(np.ones((2, 2)), np.ones(2), verbose=0, callbacks=[consensus])
        assert "train_step" not in vars(model)
