"""Cut models against the uncut one in this process: outputs, gradients, and 10 steps of Adam.

Every case builds a model of plain Keras and names rules; the reference knows nothing of slices. The same
cases run on threads, layer by layer, and under horovodrun, all layers in a few models. In float64: Adam makes
steps of the rounding errors of gradients that should be zero, as that of a key's bias is.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from hvdext.comm.current import current
from tests.multiprocess.programs.exchange_programs import Program

L = keras.layers
STEPS = 10


@dataclass(frozen=True)
class Case:
    """`build()` gives the uncut model, `inputs` its batch: integers below a number, or normal numbers.

    `size`: ranks when it runs on threads.
    """

    build: Callable
    rules: dict
    inputs: tuple  # of (shape, None or the upper limit of integers)
    size: int = 2


def _model(inputs, outputs):
    return keras.Model(inputs, outputs, name="model")


def _column():
    x = keras.Input((6,))
    y = L.Dense(8, activation="softmax", kernel_regularizer="l2", name="up")(x)
    return _model(x, L.Dense(3, name="last")(y))


def _row():
    x = keras.Input((5, 8))
    y = L.Dense(6, activation="gelu", name="down")(x)
    return _model(x, L.Dense(3, name="last")(y))


def _mlp():
    x = keras.Input((6,))
    y = L.Dense(4, name="first")(x)
    y = L.Dense(16, activation="gelu", kernel_regularizer=keras.regularizers.L1(0.01), name="up")(y)
    y = L.Dropout(0.4, seed=3, name="dropout")(L.ReLU(name="relu")(y))
    return _model(x, L.Dense(4, name="down")(y))


def _sequential():
    inner = keras.Sequential(
        [keras.Input((6,)), L.Dense(8, activation="tanh", name="up"), L.Dense(6, name="down")], name="inner"
    )
    return keras.Sequential([keras.Input((6,)), inner, L.Dense(2, name="last")], name="model")


def _embedding():
    x = keras.Input((5,), dtype="int32")
    y = L.Embedding(16, 8, mask_zero=True, name="table")(x)
    return _model(x, L.Dense(3, name="last")(L.GlobalAveragePooling1D(name="mean")(y)))


def _attention():
    x, source = keras.Input((5, 6)), keras.Input((7, 3))
    y = L.MultiHeadAttention(4, 3, value_dim=2, dropout=0.3, seed=5, name="self")(x, x, use_causal_mask=True)
    y = L.LayerNormalization(name="norm")(L.Add(name="add")([x, y]))
    y = L.MultiHeadAttention(4, 2, output_shape=(2, 3), use_gate=True, name="cross")(y, source)
    return _model([x, source], L.Dense(2, name="last")(y))


def _grouped():
    ids = keras.Input((6,), dtype="int32")
    x = L.Embedding(9, 8, mask_zero=True, name="table")(ids)
    y = L.GroupQueryAttention(3, 8, 4, dropout=0.2, seed=1, name="grouped")(x, x)
    return _model(ids, L.Dense(2, name="last")(L.GlobalMaxPooling1D(name="max")(y)))


def _convolutions():
    x = keras.Input((9, 8, 4))
    y = L.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="alone")(x)
    y = L.Conv2D(8, 3, dilation_rate=2, padding="same", activation="elu", name="first")(y)
    y = L.MaxPooling2D(2, name="pool")(y)
    y = L.Conv2D(4, (2, 1), name="second")(y)
    y = L.Conv2D(8, 1, use_bias=False, name="third")(y)
    return _model(x, L.Dense(3, name="last")(L.GlobalAveragePooling2D(name="mean")(y)))


def _transformer(dropout=0.1):
    """Every kind of layer but convolutions."""
    ids = keras.Input((6,), dtype="int32")
    x = L.Add(name="embed")([L.Embedding(16, 8, name="token")(ids), L.Embedding(16, 8, name="other")(ids)])
    y = L.LayerNormalization(name="norm1")(x)
    y = L.MultiHeadAttention(4, 2, dropout=dropout, seed=2, name="attention")(y, y, use_causal_mask=True)
    x = L.Add(name="add1")([x, y])
    y = L.LayerNormalization(name="norm2")(x)
    y = L.Dense(16, activation="gelu", name="up")(y)
    y = L.Dropout(dropout, seed=4, name="dropout")(y)
    y = L.Dense(8, name="down")(y)
    x = L.GroupQueryAttention(2, 4, 4, name="grouped")(x, x)
    return _model(ids, L.Add(name="add2")([x, y]))


CASES = {
    "column": Case(_column, {"up": "column"}, (((6,), None),)),
    "row": Case(_row, {"down": "row"}, (((5, 8), None),)),
    "column and row": Case(_mlp, {"up": "column", "down": "row"}, (((6,), None),)),
    "nested": Case(_sequential, {"inner/u*": "column", "*/down": "row"}, (((6,), None),)),
    "embedding rows": Case(_embedding, {"table": "rows"}, (((5,), 16),)),
    "embedding columns": Case(_embedding, {"table": "columns"}, (((5,), 16),)),
    "attention": Case(_attention, {"self": "heads", "cross": "heads"}, (((5, 6), None), ((7, 3), None))),
    "grouped attention": Case(_grouped, {"grouped": "heads"}, (((6,), 9),), size=4),
    "convolutions": Case(
        _convolutions,
        {
            "alone": "filters",
            "first": "filters",
            "second": "channels",
            "third": "filters",
            "last": "row",
        },
        (((9, 8, 4), None),),
    ),
}
RULES = {
    "token": "rows",
    "other": "columns",
    "attention": "heads",
    "up": "column",
    "down": "row",
    "grouped": "heads",
}
WHOLE_MODELS = {
    "transformer": Case(_transformer, RULES, (((6,), 16),)),
    "convolutions": CASES["convolutions"],
}


@contextlib.contextmanager
def floatx(name):
    """Context in which layers are made with this type; Keras keeps it in two places."""
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def batch(case, number, rows=4):
    """Inputs of batch `number`, the same wherever they are asked for."""
    generator = np.random.default_rng([7, number])
    arrays = [
        generator.integers(0, limit, (rows, *shape)).astype("int32")
        if limit
        else generator.normal(size=(rows, *shape)).astype(keras.config.floatx())
        for shape, limit in case.inputs
    ]
    return arrays if len(arrays) > 1 else arrays[0]


def targets(model, number, rows=4):
    shape = (rows, *model.output_shape[1:])
    return np.random.default_rng([8, number]).normal(size=shape).astype(keras.config.floatx())


def built(case):
    """The uncut model, the same weights on every call."""
    keras.utils.set_random_seed(1)
    model = case.build()
    generator = np.random.default_rng(0)
    model.set_weights([w + generator.normal(scale=0.3, size=w.shape) for w in model.get_weights()])
    return model


def evaluated(model, case, whole=lambda model, values: values, optimizer=None, graph=False):
    """Outputs and gradients of one batch, then the weights and slots after 10 steps, and the losses.

    Args:
        model: cut or not.
        case: what it was built for.
        whole: puts values of this rank's slices together.
        optimizer: default: Adam.
        graph: train in Keras' own training step.
    """
    import tensorflow as tf

    x, y = batch(case, 0), targets(model, 0)
    outputs = model(x, training=False)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x, training=False) - y) ** 2) + sum(model.losses)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    gradients = [tf.convert_to_tensor(g).numpy() for g in gradients]
    model.compile(optimizer or keras.optimizers.Adam(0.02), "mse", run_eagerly=not graph, jit_compile=False)
    losses = [float(model.train_on_batch(batch(case, n), targets(model, n))) for n in range(STEPS)]
    slots = [v for v in model.optimizer.variables if len(v.shape)]
    return {
        "outputs": np.array(outputs),
        "gradients": whole(variables, gradients),
        "weights": whole(variables, [v.numpy() for v in variables]),
        "slots": whole_slots(variables, slots, whole),
        "losses": losses,
    }


def whole_slots(variables, slots, whole):
    """Slots lie in rows as long as the variables; they are cut as these are."""
    repeated = [variables[i % len(variables)] for i in range(len(slots))]
    if [s.shape for s in slots] != [v.shape for v in repeated]:  # momentum and velocity take turns
        repeated = [v for v in variables for _ in range(len(slots) // len(variables))]
    return whole(repeated, [s.numpy() for s in slots])


def whole_over(comm):
    """Puts slices together by what their variables say, without hvdext's own exchange of them."""
    from hvdext.keras_tools.slice_marks import mark_of

    def whole(variables, values):
        found = []
        for variable, value in zip(variables, values, strict=True):
            marked = mark_of(variable)
            parts = comm.allgather_object(value, "hvdext.demo.whole")
            if marked is None:
                for part in parts:  # whole variables are the same on all ranks, bit for bit
                    np.testing.assert_array_equal(part, value)
            found.append(value if marked is None else np.concatenate(parts, marked[0].axis))
        return found

    return whole


def assert_equal(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for what, values in expected.items():
        mine, theirs = found[what], values
        if what in ("outputs", "losses"):
            mine, theirs = [mine], [theirs]
        assert len(mine) == len(theirs) > 0
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            np.testing.assert_allclose(
                np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance, err_msg=f"{what} {i}"
            )


# -- under horovodrun ----------------------------------------------------------------------------------


def _with_dynamic_sets(hvd):
    """A second job, in which process sets can be added; the first one has registered its own."""
    if hvd.size() > 2 and os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") in ("", "0"):
        hvd.barrier()  # who leaves first ends the engine
        hvd.shutdown()
        hvd.init(process_sets="dynamic", deadline=60)


def _whole_model(name):
    case = WHOLE_MODELS[name]

    def run(hvd):
        with floatx("float64"):
            cut = hvd.slice_layers(built(case), case.rules)
            return evaluated(cut, case, whole_over(current()), graph=True)

    def check(ranks):
        with floatx("float64"):
            expected = evaluated(built(case), case)
        for found in ranks:
            assert_equal(found, expected)

    return Program(run, check, sizes=(2, 4))


def _run_grid(hvd):
    """Data and slices: 5 steps on shards of the batches, the norm clipped; then the whole model in a file."""
    _with_dynamic_sets(hvd)
    case = WHOLE_MODELS["transformer"]
    with floatx("float64"):
        grid = hvd.Grid(slices=2)
        with grid.data_parallel():
            cut = hvd.slice_layers(lambda: _quiet_transformer(hvd.rank()), case.rules)
            optimizer = keras.optimizers.AdamW(0.02, global_clipnorm=0.1)
            cut.compile(hvd.DistributedOptimizer(optimizer), "mse")
            x, y = batch(case, 0, 40), targets(cut, 0, 40)
            data = hvd.data.shard(x, y, batch_size=8 // grid.data.size, shuffle=False)
            callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
            cut.fit(data, shuffle=False, callbacks=[callback], verbose=0)
            folder = hvd.broadcast_object(tempfile.mkdtemp() if hvd.rank() == 0 else None)
            folder = grid.slices.broadcast_object(folder, 0, "hvdext.demo.folder")
            path = Path(folder, "model.keras")
            hvd.save_uncut(cut, path)
            saved = keras.models.load_model(path)
            found = [v.numpy() for v in [*saved.weights, *saved.optimizer.variables]]
        everywhere = _error(lambda: hvd.broadcast_variables(cut.weights, 0))
        hvd.barrier()
    return {
        "state": found,
        "everywhere": everywhere,
        "shape": list(grid.shape),
        "alone": hvd.Grid(data=hvd.size()).slices.size,
        "not a grid": _error(lambda: hvd.Grid(data=2, pipeline=2, slices=2)),
    }


def _check_grid(ranks):
    case = WHOLE_MODELS["transformer"]
    with floatx("float64"):
        model = _quiet_transformer(0)
        model.compile(keras.optimizers.AdamW(0.02, global_clipnorm=0.1), "mse")
        model.fit(batch(case, 0, 40), targets(model, 0, 40), batch_size=8, shuffle=False, verbose=0)
    expected = [v.numpy() for v in [*model.weights, *model.optimizer.variables]]
    for result in ranks:
        assert len(result["state"]) == len(expected)
        for mine, theirs in zip(result["state"], expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-8)
        assert "slice 1 of 2 along axis" in result["everywhere"]
        assert result["shape"] == [len(ranks) // 2, 1, 2]
        assert result["alone"] == 1
        assert f"Received: data=2, pipeline=2, slices=2 on {len(ranks)} ranks" in result["not a grid"]


def _quiet_transformer(seed):
    """As its initializers make it, and without dropout, whose masks differ from shard to shard."""
    keras.utils.set_random_seed(seed)
    return _transformer(dropout=0.0)


def _error(action):
    try:
        return action()
    except ValueError as error:
        return str(error)


def _run_mixed(hvd):
    """mixed_float16: half-precision sums, and an overflow that all ranks skip together."""
    case = WHOLE_MODELS["transformer"]
    with mixed_float16():
        cut = hvd.slice_layers(built(case), case.rules)
        course = _course(cut, case)
        before = cut.get_weights()
        up = cut.get_layer("up")
        if hvd.rank() == 1:
            up.kernel.assign(up.kernel * 1e5)
        cut.train_on_batch(batch(case, 3), targets(cut, 3))
        return {
            "course": course,
            "moved": not np.array_equal(before[0], cut.get_weights()[0]),
            "then": _scaling(cut.optimizer),
        }


def _course(model, case):
    """Losses, updates and loss scales of some steps; at first the scale is too high."""
    model.compile(keras.optimizers.SGD(0.01), "mse")
    found = []
    for n in range(6):
        loss = float(model.train_on_batch(batch(case, n), targets(model, n)))
        found.append([loss, *_scaling(model.optimizer)])
    return found


def _scaling(optimizer):
    return [int(optimizer.iterations), float(optimizer.dynamic_scale)]


@contextlib.contextmanager
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


def _check_mixed(ranks):
    case = WHOLE_MODELS["transformer"]
    with mixed_float16():
        expected = _course(built(case), case)
    assert expected[-1][1] > 1  # some updates
    for result in ranks:
        np.testing.assert_allclose(result["course"], expected, rtol=0.02)
        assert result["course"] == ranks[0]["course"]
        iterations, scale = result["course"][-1][1:]
        assert not result["moved"]
        assert result["then"] == [iterations, scale / 2]


PROGRAMS = {
    "cut transformer": _whole_model("transformer"),
    "cut convolutions": _whole_model("convolutions"),
    "cut in mixed precision": Program(_run_mixed, _check_mixed, sizes=(2,)),
    "grid of data and slices": Program(_run_grid, _check_grid, sizes=(2, 4)),
}
