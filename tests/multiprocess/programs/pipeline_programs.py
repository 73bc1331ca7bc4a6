"""Pipelines of ranks against one process: every schedule, with data parallelism, files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np

from tests.multiprocess.programs import crossing_cases as crossing
from tests.multiprocess.programs import pipeline_cases as cases
from tests.multiprocess.programs.exchange_programs import Program
from tests.multiprocess.programs.slice_programs import _with_dynamic_sets as with_dynamic_sets


def _trained(schedule, optimizer):
    def run(hvd):
        with_dynamic_sets(hvd)
        places = hvd.size() * (2 if schedule == "interleaved" else 1)
        model = hvd.pipeline(cases.branched, cases.branched_plan(hvd, places), 4, schedule)
        model.compile(cases.OPTIMIZERS[optimizer](), cases.BRANCHED_LOSS)
        x, y = cases.branched_data()
        history = model.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0)
        return {"loss": history.history["loss"][0], "weights": cases.values(model)}

    def check(ranks):
        loss, expected = cases.branched_reference(optimizer)
        for rank in ranks:
            np.testing.assert_allclose(rank["loss"], loss, rtol=1e-5)
        _assert_weights(ranks, expected)

    # A schedule does not know the optimizer: with four ranks each has one.
    with_four = optimizer == ("adam" if schedule == "interleaved" else "sgd")
    return Program(run, check, sizes=(2, 4) if with_four else (2,))


def _assert_weights(ranks, expected, tolerance=1e-5):
    """Each weight is on one rank, with its value in one process."""
    paths = [path for rank in ranks for path in rank["weights"]]
    assert sorted(paths) == sorted(expected)
    for rank in ranks:
        for path, value in rank["weights"].items():
            np.testing.assert_allclose(value, expected[path], rtol=0, atol=tolerance, err_msg=path)


# -- with data parallelism -----------------------------------------------------------------------------


def _clipped():
    return keras.optimizers.Adam(0.01, global_clipnorm=0.5)


def _run_grid(hvd):
    with_dynamic_sets(hvd)
    grid = hvd.Grid(data=2, pipeline=2)
    x, y = cases.plain_data()
    mine = slice(grid.place.data, None, 2)  # every other row, so that two halves of a batch are one batch
    plan = hvd.plan(cases.plain, places=2)
    with grid.data_parallel():
        keras.utils.set_random_seed(grid.place.data)  # the start is broadcast all the same
        model = hvd.pipeline(cases.plain.__wrapped__, plan, 2, grid=grid)
        start = cases.values(model)
        model.compile(hvd.DistributedOptimizer(_clipped()), "mse", metrics=["mae"])
        average = hvd.callbacks.MetricAverageCallback()
        options = {"batch_size": cases.ROWS // 2, "shuffle": False, "verbose": 0, "callbacks": [average]}
        logs = model.fit(x[mine], y[mine], **options).history
    return {"start": start, "weights": cases.values(model), "logs": logs}


def _check_grid(ranks):
    for pair in zip(ranks[:2], ranks[2:], strict=True):
        for path, value in pair[0]["weights"].items():
            np.testing.assert_array_equal(value, pair[1]["weights"][path])
    whole = cases.plain.__wrapped__()
    start = ranks[0]["start"] | ranks[1]["start"]
    whole.set_weights([np.array(start[path]) for path in cases.values(whole)])
    whole.compile(_clipped(), "mse", metrics=["mae"])
    logs = whole.fit(*cases.plain_data(), batch_size=cases.ROWS, shuffle=False, verbose=0).history
    for rank in ranks:
        for name in ("loss", "mae"):
            np.testing.assert_allclose(rank["logs"][name], logs[name], rtol=1e-5)
    _assert_weights(ranks[:2], cases.values(whole))


# -- files -----------------------------------------------------------------------------------------------


def _run_files(hvd):
    """Trains, saves, and goes on in one process from the file, and in a pipeline from the file."""
    with_dynamic_sets(hvd)
    folder = hvd.broadcast_object(tempfile.mkdtemp(), 0)
    path = str(Path(folder, "whole.keras"))
    x, y = cases.plain_data()
    half = len(x) // 2

    def make():
        plan = hvd.plan(cases.plain, places=hvd.size())
        model = hvd.pipeline(cases.plain, plan, 2, "gpipe")
        model.compile(cases.OPTIMIZERS["adam"](), "mse", metrics=["mae"])
        return model

    options = {"batch_size": cases.ROWS, "shuffle": False, "verbose": 0}
    first = make()
    first.fit(x[:half], y[:half], **options)
    first.save(path)
    second = make()
    second.load_checkpoint(path)
    second.fit(x[half:], y[half:], **options)
    alone = {}
    if hvd.rank() == 0:
        opened = keras.models.load_model(path)
        opened.fit(x[half:], y[half:], **options)
        alone = cases.values(opened)
    hvd.barrier()  # the file is read
    scores = second.evaluate(x[:-3], y[:-3], batch_size=32, verbose=0)
    return {
        "weights": cases.values(second),
        "alone": alone,
        "scores": scores,
        "predictions": second.predict(x[:5], batch_size=3, verbose=0),
    }


def _check_files(ranks):
    x, y = cases.plain_data()
    whole = cases.plain()
    whole.compile(cases.OPTIMIZERS["adam"](), "mse", metrics=["mae"])
    whole.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0)
    expected = cases.values(whole)
    _assert_weights(ranks, expected)
    for path, value in ranks[0]["alone"].items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-5)
    scores = whole.evaluate(x[:-3], y[:-3], batch_size=32, verbose=0)
    for rank in ranks:
        np.testing.assert_allclose(rank["scores"], scores, rtol=1e-5)
        np.testing.assert_allclose(rank["predictions"], whole.predict(x[:5], verbose=0), rtol=1e-4, atol=1e-5)


# -- with cut layers, and what is refused --------------------------------------------------------------


def _run_cut(hvd):
    with_dynamic_sets(hvd)
    return crossing.run(hvd, crossing.GRIDS["pipeline, slices"], _CLIPPED)


def _check_cut(ranks):
    crossing.check(ranks, crossing.GRIDS["pipeline, slices"], _CLIPPED)


_CLIPPED = "global norm, EMA, decay"


def _run_changed(hvd):
    """One rank's layer is quantized after the cut; `class_weight` where one rank has targets."""
    with_dynamic_sets(hvd)
    x, _ = cases.plain_data(1)
    model = hvd.pipeline(cases.plain, hvd.plan(cases.plain, places=hvd.size()), 2)
    model.compile("sgd", "sparse_categorical_crossentropy")
    y = (x[:, 0] > 0).astype("int32") if hvd.rank() == hvd.size() - 1 else None
    losses = model.fit(x, y, class_weight={0: 1.0, 1: 3.0}, batch_size=cases.ROWS, verbose=0).history["loss"]
    if hvd.rank() == 0:
        model.stages[0].held[0].quantize("int8")
    try:
        model.save("never.keras")
    except ValueError as error:
        return {"losses": losses, "error": str(error)}
    return {"losses": losses, "error": "none"}


def _check_changed(ranks):
    for rank in ranks:
        assert rank == ranks[0]
        assert np.isfinite(rank["losses"][0])
        assert "must stay as they were when it was cut" in rank["error"]


PROGRAMS = {
    f"pipeline: {schedule}, {optimizer}": _trained(schedule, optimizer)
    for schedule in ("gpipe", "1f1b", "eager-1f1b", "interleaved")
    for optimizer in cases.OPTIMIZERS
} | {
    "pipeline: grid": Program(_run_grid, _check_grid, sizes=(4,)),
    "pipeline: cut layers": Program(_run_cut, _check_cut, sizes=(4,)),
    "pipeline: changed layers": Program(_run_changed, _check_changed, sizes=(2,)),
    "pipeline: files": Program(_run_files, _check_files, sizes=(2, 4)),
}
