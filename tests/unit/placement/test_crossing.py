"""Data parallelism, pipelines and slices, with what optimizers do beside updating: together as one process.

Each case trains a model with repeated rows of an embedding (sparse gradients) and penalties of weights.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.keras_tools.slice_marks import mark_of
from hvdext.testing import run_ranks

L, Optimizers = keras.layers, keras.optimizers
X = np.random.default_rng(0).integers(0, 6, (32, 3))
Y = X.mean(1, keepdims=True).astype("float32") / 3
ROWS = 16
STAGES = {"table": 0, "pool": 0, "up0": 0, "down0": 0, "up1": 1, "down1": 1, "out": 1}

# Sizes of the axes, by name.
GRIDS = {
    "data": {"data": 2},
    "pipeline": {"pipeline": 2},
    "slices": {"slices": 2},
    "pipeline, slices": {"pipeline": 2, "slices": 2},
    "data, pipeline": {"data": 2, "pipeline": 2},
    "data, slices": {"data": 2, "slices": 2},
    "all": {"data": 2, "pipeline": 2, "slices": 2},
}
OPTIMIZERS = {
    "global norm, EMA, decay": lambda: Optimizers.AdamW(
        0.01, weight_decay=0.1, global_clipnorm=0.05, use_ema=True, ema_momentum=0.5
    ),
    "norm, loss scale": lambda: Optimizers.LossScaleOptimizer(
        Optimizers.SGD(0.1, momentum=0.9, clipnorm=0.02), initial_scale=8.0
    ),
    "value, accumulation": lambda: Optimizers.SGD(0.1, clipvalue=0.004, gradient_accumulation_steps=2),
    "global norm, accumulation": lambda: Optimizers.SGD(
        0.1, global_clipnorm=0.05, gradient_accumulation_steps=2
    ),
}


def build(grid=None):
    """The same values each time: uncut, or the parts of the uncut ones."""
    seed = iter(range(20))

    def drawn(name="kernel_initializer"):
        return {name: keras.initializers.GlorotUniform(next(seed))}

    x = keras.Input((3,), dtype="int32", name="x")
    h = L.Embedding(6, 4, name="table", **drawn("embeddings_initializer"))(x)
    h = L.GlobalAveragePooling1D(name="pool")(h)
    penalty = keras.regularizers.L2(0.01)
    for k in range(2):
        up = {"units": 8, "activation": "gelu", "kernel_regularizer": penalty, "name": f"up{k}"} | drawn()
        down = {"units": 4, "name": f"down{k}"} | drawn()
        if grid is None:
            h = L.Dense(**down)(L.Dense(**up)(h))
        else:
            h = hvd.ColumnDense(gather=False, grid=grid, **up)(h)
            h = hvd.RowDense(sliced_input=True, grid=grid, **down)(h)
    return keras.Model(x, L.Dense(1, name="out", **drawn())(h), name="crossed")


def trained(model, optimizer, x, y, rows):
    model.compile(optimizer, "mse", jit_compile=False)
    history = model.fit(x, y, batch_size=rows, shuffle=False, epochs=2, verbose=0)
    return history.history["loss"]


def program(comm, axes, optimizer):
    grid = hvd.Grid(**axes)
    cut = grid if grid.slices.size > 1 else None
    mine = slice(grid.place.data, None, grid.data.size)  # so that the parts of batches are one batch
    with grid.data_parallel():
        if grid.pipeline.size > 1:
            plan = hvd.plan(lambda: build(cut), 2, pins=STAGES)
            model = hvd.pipeline(lambda: build(cut), plan, 2, grid=grid)
        else:
            model = build(cut)
        if grid.data.size > 1:
            optimizer = hvd.DistributedOptimizer(optimizer)
        loss = trained(model, optimizer, X[mine], Y[mine], ROWS // grid.data.size)
    marks = {v.path: mark_of(v) for v in model.weights}
    parts = {path: None if mark is None else mark[0] for path, mark in marks.items()}
    return loss, {v.path: v.numpy() for v in model.weights}, parts


def check(axes, way):
    whole = build()
    expected = trained(whole, OPTIMIZERS[way](), X, Y, ROWS)
    ranks = int(np.prod(list(axes.values())))
    results = run_ranks(ranks, lambda comm: program(comm, axes, OPTIMIZERS[way]()))
    values = {v.path: v.numpy() for v in whole.weights}
    assert set().union(*(weights for _, weights, _ in results)) == set(values)
    for loss, weights, parts in results:
        if "data" not in axes:  # whose losses are of each rank's rows
            np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for path, value in weights.items():
            part = parts[path]
            wanted = values[path] if part is None else part.of(values[path])
            np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("way", ["global norm, EMA, decay", "norm, loss scale", "value, accumulation"])
@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "all"])
@pytest.mark.slow
def test_what_optimizers_do_beside_updating(grid, way):
    check(GRIDS[grid], way)


@pytest.mark.slow
def test_all_three_at_once():
    check(GRIDS["all"], "global norm, EMA, decay")


@pytest.mark.slow
def test_accumulation_with_the_norm_over_all_stages():
    check(GRIDS["pipeline"], "global norm, accumulation")


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
    def refused(comm):
        with pytest.raises(ValueError, match=sentence):
            program(comm, GRIDS[grid], OPTIMIZERS[way]())
        return True

    axes = GRIDS[grid]
    assert all(run_ranks(int(np.prod(list(axes.values()))), refused))


@pytest.mark.slow
def test_a_sync_over_the_data_axis_of_a_pipeline_of_cut_layers():
    """Pipelines side by side take steps of their own and average: as two processes that do."""

    def synced(comm):
        grid = hvd.Grid(**GRIDS["all"])
        mine = slice(grid.place.data * ROWS, (grid.place.data + 1) * ROWS)
        with grid.data_parallel():
            plan = hvd.plan(lambda: build(grid), 2, pins=STAGES)
            model = hvd.pipeline(lambda: build(grid), plan, 2, grid=grid)
            model.compile(Optimizers.SGD(0.1, global_clipnorm=0.05), "mse")
            sync = hvd.LocalSGD(every=1)
            model.fit(X[mine], Y[mine], batch_size=ROWS, shuffle=False, verbose=0, callbacks=[sync])
        parts = {v.path: mark_of(v) for v in model.weights}
        return {v.path: (v.numpy(), parts[v.path] and parts[v.path][0]) for v in model.weights}

    alone = []
    for place in range(2):
        model = build()
        mine = slice(place * ROWS, (place + 1) * ROWS)
        model.compile(Optimizers.SGD(0.1, global_clipnorm=0.05), "mse")
        model.fit(X[mine], Y[mine], batch_size=ROWS, shuffle=False, verbose=0)
        alone.append({v.path: v.numpy() for v in model.weights})
    for weights in run_ranks(8, synced):
        for path, (value, part) in weights.items():
            mean = (alone[0][path] + alone[1][path]) / 2
            wanted = mean if part is None else part.of(mean)
            np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-6, err_msg=path)
