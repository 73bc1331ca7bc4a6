"""Data parallelism, pipelines and slices, and what optimizers do beside updating: together as one process."""

from __future__ import annotations

import math

import keras
import pytest

import hvdext as hvd
from hvdext.testing import run_ranks
from tests.multiprocess.programs import crossing_cases as cases


def check(grid, way):
    axes = cases.GRIDS[grid]
    ranks = run_ranks(math.prod(axes.values()), lambda comm: cases.run(hvd, axes, way))
    cases.check(ranks, axes, way)


WAYS = ("global norm, EMA, decay", "norm, loss scale", "value, accumulation")
# Each axis with each way, each pair of axes with one.
CROSSED = [(axis, way) for axis in ("data", "pipeline", "slices") for way in WAYS]
CROSSED += zip(("pipeline, slices", "data, slices", "data, pipeline"), WAYS, strict=True)


@pytest.mark.parametrize(("grid", "way"), CROSSED)
@pytest.mark.slow
def test_what_optimizers_do_beside_updating(grid, way):
    check(grid, way)


@pytest.mark.slow
def test_all_three_at_once():
    check("all", "global norm, EMA, decay")


@pytest.mark.slow
def test_accumulation_with_the_norm_over_all_stages():
    check("pipeline", "global norm, accumulation")


@pytest.mark.parametrize(
    ("grid", "way", "sentence"),
    [
        (
            "slices",
            "global norm, accumulation",
            "`gradient_accumulation_steps` must be None with clipping by",
        ),
        ("pipeline, slices", "global norm, accumulation", "`gradient_accumulation_steps` must be None with"),
        ("data, pipeline", "global norm, accumulation", "`global_clipnorm` must be None for a pipeline with"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_combined(grid, way, sentence):
    axes = cases.GRIDS[grid]

    def refused(comm):
        with pytest.raises(ValueError, match=sentence):
            cases.run(hvd, axes, way)
        return True

    assert all(run_ranks(math.prod(axes.values()), refused))


@pytest.mark.slow
def test_a_sync_over_the_data_axis_of_a_pipeline_of_cut_layers():
    """Pipelines side by side take steps of their own and average: as two processes that do."""

    rows = [slice(place * cases.ROWS, (place + 1) * cases.ROWS) for place in range(2)]

    def fitted(model, mine, **options):
        model.compile(keras.optimizers.SGD(0.1, global_clipnorm=0.05), "mse")
        x, y = cases.X[mine], cases.Y[mine]
        model.fit(x, y, batch_size=cases.ROWS, shuffle=False, verbose=0, **options)
        return model

    def synced(comm):
        grid = hvd.Grid(**cases.GRIDS["all"])
        build = lambda: cases.build(hvd, grid)  # noqa: E731
        with grid.data_parallel():
            model = hvd.pipeline(build, hvd.plan(build, 2, pins=cases.STAGES), 2, grid=grid)
            return cases.held(fitted(model, rows[grid.place.data], callbacks=[hvd.sync.LocalSGD(every=1)]))

    alone = [fitted(cases.build(), mine).get_weights() for mine in rows]
    paths = [v.path for v in cases.build().weights]
    mean = {path: (a + b) / 2 for path, a, b in zip(paths, *alone, strict=True)}
    for rank in run_ranks(8, synced):
        cases.assert_held(rank, mean)
