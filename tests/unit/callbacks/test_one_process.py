"""`AsOneProcess` and `BestModelCheckpoint`; the programs run with real processes as well."""

import json

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.testing import run_ranks
from tests.multiprocess.programs import callback_programs


@pytest.mark.parametrize("name", callback_programs.CALLBACKS)
@pytest.mark.slow
def test_callbacks_of_keras(name):
    run, check = callback_programs.CALLBACKS[name]
    results = run_ranks(2, lambda comm: callback_programs.in_folder(run)(hvd))
    check(json.loads(json.dumps(results)))


def _fit(callbacks, epochs=2, **options):
    model = callback_programs.make_model(hvd)
    return callback_programs.fit(hvd, model, callbacks, epochs, **options), model


def _error(function, *arguments):
    try:
        function(*arguments)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


class Hooks(keras.callbacks.Callback):
    """Notes which hooks ran and how many ranks there seemed to be."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def on_train_begin(self, logs=None):
        self.ran.append(("train begin", hvd.size()))

    def on_batch_end(self, batch, logs=None):
        self.ran.append(("batch end", hvd.size()))

    def on_predict_begin(self, logs=None):
        self.ran.append(("predict begin", hvd.size()))

    def on_predict_batch_end(self, batch, logs=None):
        self.ran.append(("predict batch end", hvd.size()))


@pytest.mark.slow
def test_hooks_run_on_the_first_rank_as_if_it_were_alone():
    def run(comm):
        hooks = Hooks()
        wrapped = hvd.callbacks.AsOneProcess([hooks])
        _, model = _fit([wrapped], epochs=1)
        if comm.rank == 0:  # predicting takes one rank only
            model.predict(np.ones((2, 2), "float32"), verbose=0, callbacks=[wrapped])
        return hooks.ran

    names = ["train begin", "batch end", "batch end", "predict begin", "predict batch end"]
    assert run_ranks(2, run) == [[(name, 1) for name in names], []]


@pytest.mark.slow
def test_logs_are_those_of_all_ranks():
    def run(comm):
        seen = []
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs)))
        before = [hvd.callbacks.MetricAverageCallback()] if comm.size == 3 else []
        history, _ = _fit([*before, hvd.callbacks.AsOneProcess([look])], epochs=1)
        return seen, {name: values[0] for name, values in history.items()}

    for size in (2, 3):  # with three ranks, a MetricAverageCallback in front of it
        results = run_ranks(size, run)
        assert results[0][0] == [results[0][1]]
        for seen, history in results[1:]:
            assert seen == []
            assert history == results[0][1]


@pytest.mark.slow
def test_terminate_on_nan_stops_all_ranks_at_the_epochs_end():
    class Batches(keras.callbacks.Callback):
        number = 0

        def on_train_batch_end(self, batch, logs=None):
            self.number += 1

    def run(comm):
        batches = Batches()
        model = callback_programs.make_model(hvd, start=float("nan"))
        stop = hvd.callbacks.AsOneProcess([keras.callbacks.TerminateOnNaN()])
        callback_programs.fit(hvd, model, [stop, batches], 5)
        return batches.number

    assert run_ranks(2, run) == [2, 2]


@pytest.mark.slow
def test_a_scheduler_changes_the_rate_of_all_ranks():
    def run(comm):
        schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (1 + epoch))
        recorder = callback_programs.Recorder()
        _fit([hvd.callbacks.AsOneProcess([schedule]), recorder], epochs=2)
        return recorder.rates, recorder.weights

    first, second = run_ranks(2, run)
    assert first == second
    assert first[0] == [0.5, 0.25]


@pytest.mark.slow
def test_averaged_weights_are_swapped_on_all_ranks():
    class Seen(keras.callbacks.Callback):
        """Weights during validation, at the end of each epoch, and at the end."""

        def __init__(self):
            super().__init__()
            self.weights = []

        def _note(self, *args, **kwargs):
            self.weights.append(self.model.get_weights()[0].tolist())

        on_test_batch_end = on_epoch_end = on_train_end = _note

    def run(comm):
        optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        model = callback_programs._compiled(hvd.DistributedOptimizer(optimizer), 0.5)
        swap, seen = keras.callbacks.SwapEMAWeights(), Seen()
        # Without ours it works on each rank alone, as ranks hold the same weights.
        wrapped = hvd.callbacks.AsOneProcess([swap]) if comm.size == 2 else swap
        callback_programs.fit(hvd, model, [wrapped, seen], 2, validation_batch_size=20)
        return seen.weights

    first, second = run_ranks(2, run)
    assert first == second
    assert first[0] != first[1]


@pytest.mark.slow
def test_a_rate_that_changes_within_an_epoch():
    class Faster(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.optimizer.learning_rate = 1.0

    def run(comm):
        recorder = callback_programs.Recorder()
        text = _error(_fit, [hvd.callbacks.AsOneProcess([Faster()]), recorder])
        return text, recorder.rates

    (first, rates), (second, other_rates) = run_ranks(2, run)
    assert first.startswith("`callbacks` must not change the learning rate within an epoch")
    assert first in second
    assert rates == other_rates == [pytest.approx(callback_programs.RATE)]


def test_evaluate_on_all_ranks():
    def run(comm):
        hooks = []
        look = keras.callbacks.LambdaCallback()
        look.on_test_end = hooks.append
        model = callback_programs.make_model(hvd)
        x, y = callback_programs._data(comm.rank, callback_programs.VALIDATION, 2.0)
        value = model.evaluate(x, y, verbose=0, callbacks=[hvd.callbacks.AsOneProcess(look)])
        return value, hooks

    (value, seen), (other, nothing) = run_ranks(2, run)
    assert seen == [{"loss": value}]
    assert (other, nothing) == (value, [])
    xs, ys = zip(
        *(callback_programs._data(r, callback_programs.VALIDATION, 2.0) for r in range(2)), strict=True
    )
    x, y = np.concatenate(xs), np.concatenate(ys)
    assert value == pytest.approx(np.mean((x @ np.full((2, 1), 0.5) - y) ** 2), rel=1e-5)


@pytest.mark.slow
def test_validation_on_one_rank_ends_in_an_error_where_callbacks_validate():
    def run(comm):
        look = keras.callbacks.LambdaCallback()
        look.on_test_begin = lambda logs: None
        options = {"validation_data": None} if comm.rank else {}
        return _error(lambda: _fit([hvd.callbacks.AsOneProcess([look])], **options))

    first, second = run_ranks(2, run, timeout=30)
    assert first == second
    assert "rank 0: AsOneProcess.on_test_begin; rank 1: the end of epoch 1" in first


def test_ranks_with_different_callbacks():
    def run(comm):
        callbacks = [keras.callbacks.TerminateOnNaN()] if comm.rank else []
        return _error(lambda: _fit([hvd.callbacks.AsOneProcess(callbacks)]))

    first, second = run_ranks(2, run, timeout=30)
    assert first == second
    assert "callbacks: rank 0: []; rank 1: ['TerminateOnNaN']" in first


@pytest.mark.slow
def test_one_process_is_plain_keras(tmp_path):
    def run(comm):
        stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
        log = keras.callbacks.CSVLogger(tmp_path / "log.csv")
        history, model = _fit([hvd.callbacks.AsOneProcess([stop, log])], epochs=6)
        return history, model.get_weights()[0].tolist(), stop.stopped_epoch

    ((history, weights, stopped),) = run_ranks(1, run)
    model = callback_programs._compiled(keras.optimizers.SGD(callback_programs.RATE, momentum=0.9), 0.5)
    x, y = callback_programs._data(0, callback_programs.SAMPLES, 2.0)
    validation = callback_programs._data(0, callback_programs.VALIDATION, -3.0)
    stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    plain = model.fit(
        x, y, 2, 6, validation_data=validation, shuffle=False, verbose=0, callbacks=[stop]
    ).history
    assert stopped == stop.stopped_epoch > 0
    assert weights == model.get_weights()[0].tolist()
    for name, values in plain.items():
        assert history[name] == pytest.approx(values, rel=1e-6)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == len(history["loss"]) + 1


def test_wrong_callbacks():
    with pytest.raises(ValueError, match="`callbacks` must be a Keras callback or a list of them"):
        hvd.callbacks.AsOneProcess(["EarlyStopping"])
    ours = hvd.callbacks.LearningRateWarmupCallback(0.1)
    with pytest.raises(ValueError, match=r"must not hold hvd\.callbacks\.LearningRateWarmupCallback"):
        hvd.callbacks.AsOneProcess([ours])


# -- BestModelCheckpoint -------------------------------------------------------------------------------


def test_a_file_is_needed_on_the_first_rank(tmp_path):
    def run(comm, paths):
        best = hvd.callbacks.BestModelCheckpoint(filepath=paths[comm.rank])
        return _error(best.on_train_begin)

    good = str(tmp_path / "a.keras")
    assert run_ranks(2, run, [good, None]) == ["no error"] * 2
    first, second = run_ranks(2, run, [None, good])
    assert first == second
    assert first.startswith("`filepath` must be a file name that ends in '.keras'")
    assert "Received: filepath=None" in first
    assert "filepath='a.txt'" in run_ranks(1, run, ["a.txt"])[0]


@pytest.mark.slow
def test_best_weights_within_one_process(tmp_path):
    def run(comm):
        best = hvd.callbacks.BestModelCheckpoint(save_weights_only=True, filepath=tmp_path / "b.weights.h5")
        recorder = callback_programs.Recorder()
        history, _ = _fit([hvd.callbacks.AsOneProcess([best]), recorder], epochs=4)
        return history["val_loss"], recorder.weights

    losses, weights = run_ranks(2, run)[0]
    model = callback_programs._compiled("sgd", 0.0)
    model.load_weights(tmp_path / "b.weights.h5")
    assert model.get_weights()[0].tolist() == weights[int(np.argmin(losses))]


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("no folder")

    def run(comm, save_freq):
        path = tmp_path / "file" / "best.keras"
        best = hvd.callbacks.BestModelCheckpoint("loss", save_freq=save_freq, filepath=path)
        try:
            _fit([hvd.callbacks.MetricAverageCallback(), best])
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    for save_freq in ("epoch", 1):
        first, second = run_ranks(2, run, save_freq)
        assert first.startswith("NotADirectoryError")
        assert second == f"OSError: BestModelCheckpoint has failed:\n  rank 0: {first}"
