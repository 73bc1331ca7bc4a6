"""One small model that is trained along all axes of a grid, with what optimizers do beside updating.

It has repeated rows of an embedding (sparse gradients) and penalties of weights.
"""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from hvdext.keras_tools.slice_marks import Slice, mark_of

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


def build(hvd=None, grid=None):
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


def run(hvd, axes, way):
    """One rank's loss, its weights, and which parts these are."""
    grid = hvd.Grid(**axes)
    cut = grid if grid.slices.size > 1 else None
    mine = slice(grid.place.data, None, grid.data.size)  # so that the parts of batches are one batch
    optimizer = OPTIMIZERS[way]()
    with grid.data_parallel():
        if grid.pipeline.size > 1:
            plan = hvd.plan(lambda: build(hvd, cut), 2, pins=STAGES)
            model = hvd.pipeline(lambda: build(hvd, cut), plan, 2, grid=grid)
        else:
            model = build(hvd, cut)
        if grid.data.size > 1:
            optimizer = hvd.DistributedOptimizer(optimizer)
        loss = trained(model, optimizer, X[mine], Y[mine], ROWS // grid.data.size)
    return {"loss": loss} | held(model)


def held(model):
    """A rank's weights by path, and the slices that they are, as numbers; None for whole ones."""
    marks = {v.path: mark_of(v) for v in model.weights}
    parts = {path: None if mark is None else dataclasses.astuple(mark[0]) for path, mark in marks.items()}
    return {"weights": {v.path: v.numpy() for v in model.weights}, "parts": parts}


def check(ranks, axes, way):
    """All ranks' results beside plain Keras in this process."""
    whole = build()
    expected = trained(whole, OPTIMIZERS[way](), X, Y, ROWS)
    values = {v.path: v.numpy() for v in whole.weights}
    assert set().union(*(rank["weights"] for rank in ranks)) == set(values)
    for rank in ranks:
        if "data" not in axes:  # whose losses are of each rank's rows
            np.testing.assert_allclose(rank["loss"], expected, rtol=1e-5)
        assert_held(rank, values)


def assert_held(rank, values):
    """That a rank holds its parts of `values`."""
    for path, value in rank["weights"].items():
        part = rank["parts"][path]
        wanted = values[path] if part is None else Slice(*part).of(values[path])
        np.testing.assert_allclose(value, wanted, rtol=0, atol=2e-6, err_msg=path)
