"""Callbacks that decide, write and restore, on ranks with data of their own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np

from tests.multiprocess.programs.exchange_programs import Program

SAMPLES = (4, 12)  # of each rank; two batches
VALIDATION = (3, 9)
RATE = 0.05


def _data(rank, sizes, slope):
    x = np.random.default_rng([rank, *sizes]).normal(size=(sizes[rank % 2], 2)).astype("float32")
    return x, (x @ np.float32([[slope], [-1.0]])).astype("float32")


def _compiled(optimizer, start):
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(start))
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def make_model(hvd, start=0.5, rate=RATE):
    """A linear model with the exchange in its optimizer."""
    return _compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(rate, momentum=0.9)), start)


def fit(hvd, model, callbacks, epochs=4, **options):
    """Trains on this rank's samples; rank 0's validation pulls another way than the others'."""
    rank = hvd.rank()
    x, y = _data(rank, SAMPLES, 2.0)
    validation = _data(rank, VALIDATION, 2.0 if rank else -3.0)
    options = {"validation_data": validation, "verbose": 0, "shuffle": False} | options
    return model.fit(x, y, len(x) // 2, epochs, callbacks=callbacks, **options).history


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# -- each callback, within a folder that only this rank knows ---------------------------------------------


def run_early_stopping(hvd, folder):
    stop = keras.callbacks.EarlyStopping(patience=1, restore_best_weights=True)
    recorder, model = Recorder(), make_model(hvd)
    history = fit(hvd, model, [hvd.callbacks.AsOneProcess([stop]), recorder], epochs=6)
    return {"history": history, "weights": recorder.weights, "at the end": model.get_weights()[0].tolist()}


def check_early_stopping(ranks):
    first = ranks[0]
    losses = first["history"]["val_loss"]
    best = int(np.argmin(losses))
    # Patience 1: the first epoch that is no better ends it, and never the first epoch of all.
    assert len(losses) == max(best + 1, 1) + 1 < 6
    np.testing.assert_array_equal(first["at the end"], first["weights"][best])
    assert first["weights"][best] != first["weights"][-1]
    assert all(rank == first for rank in ranks)


def run_plateau(hvd, folder):
    plateau = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=1, min_delta=100.0)
    recorder = Recorder()
    history = fit(hvd, make_model(hvd), [hvd.callbacks.AsOneProcess(plateau), recorder], epochs=3)
    return {"history": history, "rates": recorder.rates, "weights": recorder.weights}


def check_plateau(ranks):
    # Nothing improves by 100, so that every epoch but the first ends with half the rate.
    for rank in ranks:
        np.testing.assert_allclose(rank["rates"], [RATE, RATE, RATE / 2], rtol=1e-6)
        # What the callback adds to the logs, before it changes the rate.
        np.testing.assert_allclose(rank["history"]["learning_rate"], [RATE, RATE, RATE / 2], rtol=1e-6)
        assert rank == ranks[0]


def run_checkpoint(hvd, folder):
    checkpoint = keras.callbacks.ModelCheckpoint(f"{folder}/{{epoch}}.keras", save_best_only=True)
    recorder, model = Recorder(), make_model(hvd)
    history = fit(hvd, model, [hvd.callbacks.AsOneProcess([checkpoint]), recorder])
    opened = {f: keras.saving.load_model(f"{folder}/{f}").get_weights()[0].tolist() for f in files_in(folder)}
    return {"history": history, "weights": recorder.weights, "opened": opened}


def check_checkpoint(ranks):
    losses, weights = ranks[0]["history"]["val_loss"], ranks[0]["weights"]
    better = [e for e, loss in enumerate(losses) if loss < min([*losses[:e], np.inf])]
    assert 0 < len(better) < len(losses)  # ranks apart: rank 0's own loss only grows, the others' only falls
    assert ranks[0]["opened"] == {f"{e + 1}.keras": weights[e] for e in better}
    assert all(rank["opened"] == {} and rank["history"] == ranks[0]["history"] for rank in ranks[1:])


def run_best_model(hvd, folder):
    best = hvd.callbacks.BestModelCheckpoint()
    best.filepath = f"{folder}/best.keras"
    recorder = Recorder()
    history = fit(hvd, make_model(hvd), [hvd.callbacks.MetricAverageCallback(), best, recorder])
    opened = {f: keras.saving.load_model(f"{folder}/{f}").get_weights()[0].tolist() for f in files_in(folder)}
    return {"history": history, "weights": recorder.weights, "opened": opened, "best": best.best}


def check_best_model(ranks):
    losses, weights = ranks[0]["history"]["val_loss"], ranks[0]["weights"]
    assert ranks[0]["opened"] == {"best.keras": weights[int(np.argmin(losses))]}
    for rank in ranks:
        assert rank["best"] == min(losses)
        assert rank["history"] == ranks[0]["history"]
    assert all(rank["opened"] == {} for rank in ranks[1:])


def run_csv(hvd, folder):
    log = keras.callbacks.CSVLogger(f"{folder}/log.csv")
    history = fit(hvd, make_model(hvd), [hvd.callbacks.AsOneProcess([log])], epochs=2)
    return {"lines": [Path(folder, f).read_text().splitlines() for f in files_in(folder)], "history": history}


def check_csv(ranks):
    header, *rows = ranks[0]["lines"][0]
    columns = zip(*(map(float, row.split(",")) for row in rows), strict=True)
    logged = dict(zip(header.split(","), map(list, columns), strict=True))
    assert logged == ranks[0]["history"] | {"epoch": [0.0, 1.0]}
    assert all(rank == {"lines": [], "history": ranks[0]["history"]} for rank in ranks[1:])


def run_tensorboard(hvd, folder):
    board = keras.callbacks.TensorBoard(str(folder), write_graph=False)
    fit(hvd, make_model(hvd), [hvd.callbacks.AsOneProcess([board])], epochs=2)
    return files_in(folder)


def check_tensorboard(ranks):
    assert sorted(f.split("/")[0] for f in ranks[0]) == ["train", "validation"]
    assert all("events.out.tfevents" in f for f in ranks[0])
    assert all(rank == [] for rank in ranks[1:])


def run_backup(hvd, folder):
    """Interrupted in the third epoch of four, then resumed by a new model, as after a restart."""

    def callbacks(*more):
        backup = keras.callbacks.BackupAndRestore(str(folder))
        broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        return [hvd.callbacks.AsOneProcess([backup]), broadcast, *more]

    whole = Recorder()
    fit(hvd, make_model(hvd), [whole])
    try:
        fit(hvd, make_model(hvd), callbacks(Interrupt(2)))
    except InterruptedError:
        kept = files_in(folder)
    resumed = Recorder()
    fit(hvd, make_model(hvd, start=7.0 + hvd.rank(), rate=1.0), callbacks(resumed))
    return {
        "kept": kept,
        "left": files_in(folder),
        "epochs": resumed.epochs,
        "weights": resumed.weights,
        "whole": whole.weights,
    }


def check_backup(ranks):
    for number, rank in enumerate(ranks):
        assert rank["epochs"] == [2, 3]
        np.testing.assert_allclose(rank["weights"], rank["whole"][2:], rtol=1e-6)
        assert rank["weights"] == ranks[0]["weights"]
        assert bool(rank["kept"]) == (number == 0)
        assert rank["left"] == []


def run_failure(hvd, folder):
    errors = []
    for failing in (Failing("on_epoch_end"), Failing("on_train_batch_end"), Failing("set_model")):
        try:
            fit(hvd, make_model(hvd), [hvd.callbacks.AsOneProcess([failing])], epochs=2)
        except (RuntimeError, OSError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def check_failure(ranks):
    hooks = ("on_epoch_end", "on_train_batch_end", "set_model")
    assert ranks[0] == ["OSError: disk full"] * 3
    expected = [f"OSError: The callback Failing.{h} has failed:\n  rank 0: OSError: disk full" for h in hooks]
    assert all(rank == expected for rank in ranks[1:])


class Recorder(keras.callbacks.Callback):
    """Weights at the end of each epoch, and the rate and number of those that begin."""

    def __init__(self):
        super().__init__()
        self.weights, self.rates, self.epochs = [], [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs.append(epoch)

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self.rates.append(float(self.model.optimizer.learning_rate.numpy()))

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights()[0].tolist())


class Interrupt(keras.callbacks.Callback):
    """Ends training in the middle of an epoch, on every rank."""

    def __init__(self, epoch):
        super().__init__()
        self._at, self._epoch = epoch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self._epoch == self._at:
            raise InterruptedError


class Failing(keras.callbacks.Callback):
    """Fails in one hook."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self._fail)

    def _fail(self, *args, **kwargs):
        raise OSError("disk full")


def run_metrics(hvd, folder):
    """Nine samples on one rank, none on the other."""
    model = make_model(hvd)
    auc = keras.metrics.AUC(num_thresholds=20, name="auc")
    model.compile(model.optimizer, "mse", metrics=[auc], jit_compile=False)
    x, y = _data(hvd.rank(), (0, 9), 2.0)
    callbacks = [hvd.callbacks.MetricAverageCallback()]
    return model.evaluate(x, y > 0, 4, verbose=0, return_dict=True, callbacks=callbacks)


def check_metrics(ranks):
    x, y = _data(1, (0, 9), 2.0)
    predicted, wanted = x @ np.full((2, 1), 0.5), (y > 0).astype(float)
    auc = keras.metrics.AUC(num_thresholds=20)
    auc.update_state(wanted, predicted)
    expected = {"loss": np.mean((predicted - wanted) ** 2), "auc": float(auc.result())}
    for rank in ranks:
        assert rank.keys() == expected.keys()
        np.testing.assert_allclose([rank[n] for n in expected], list(expected.values()), rtol=1e-5)


CALLBACKS = {
    "metrics": (run_metrics, check_metrics),
    "early stopping": (run_early_stopping, check_early_stopping),
    "plateau": (run_plateau, check_plateau),
    "checkpoint": (run_checkpoint, check_checkpoint),
    "best model": (run_best_model, check_best_model),
    "csv": (run_csv, check_csv),
    "backup": (run_backup, check_backup),
    "failure": (run_failure, check_failure),
    "tensorboard": (run_tensorboard, check_tensorboard),
}


def in_folder(run):
    """`run(hvd)` with a new folder of this rank's own."""

    def run_there(hvd):
        with tempfile.TemporaryDirectory() as folder:
            return run(hvd, folder)

    return run_there


PROGRAMS = {
    f"callback {name}": Program(in_folder(run), check, sizes=(2,)) for name, (run, check) in CALLBACKS.items()
}
