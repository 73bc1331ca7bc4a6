"""`jit_compile=True`: XLA compiles what computes and not what ranks exchange; the numbers are the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.eager import context

import hvdext as hvd
from hvdext.testing import run_ranks

DATA = np.random.default_rng(3)
X = DATA.normal(size=(24, 6)).astype("float32")
Y = DATA.normal(size=(24, 3)).astype("float32")
TOKENS = DATA.integers(1, 6, (24, 4))
TOKENS[::2, 1:] = 0
OPTIMIZERS = (
    *("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax"),
    *("Nadam", "Ftrl", "Lion", "Lamb", "Adafactor", "Muon"),
)


def dense(dtype=None):
    penalty = None if dtype else "l2"  # Keras cannot add penalties of two types
    hidden = layers.Dense(
        5, activation="tanh", dtype=dtype, kernel_regularizer="l2", activity_regularizer=penalty
    )
    last = layers.Dense(3, dtype=dtype)
    return keras.Sequential([keras.Input((6,)), hidden, layers.BatchNormalization(dtype=dtype), last])


def line():
    return keras.Sequential([keras.Input((6,)), layers.Dense(3)])


SHORT = {"build": line, "metrics": [], "epochs": 1}  # where only the update matters


def recurrent():
    return keras.Sequential([keras.Input((6, 1)), layers.LSTM(4), layers.Dense(3)])


def words():
    pooled = [layers.Embedding(6, 4), layers.GlobalAveragePooling1D(), layers.Dense(3)]
    return keras.Sequential([keras.Input((4,), dtype="int32"), *pooled])


def words_under_mask():
    return keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(6, 3, mask_zero=True)])


def normalized_over_ranks():
    normal = hvd.SyncBatchNormalization()
    return keras.Sequential([keras.Input((6,)), layers.Dense(5), normal, layers.Dense(3)])


class Follows(keras.Model):
    """A step that goes on with the weights that the optimizer has just changed."""

    def train_step(self, data):
        logs = super().train_step(data)
        return logs | {"norm": tf.reduce_sum(self.trainable_variables[0].value ** 2)}


def following():
    x = keras.Input((6,))
    return Follows(x, layers.Dense(3)(x))


def weights_of(model):
    return [w.numpy() for w in model.trainable_variables]


def begin_alike(model):
    numbers = np.random.default_rng(5)
    model.set_weights([0.3 * numbers.normal(size=w.shape) if w.ndim > 1 else w for w in model.get_weights()])


def trained(
    comm,
    jit_compile,
    build=dense,
    optimizer="Adam",
    x=X,
    y=Y,
    epochs=2,
    callbacks=(),
    settings=None,
    scale=None,
    metrics=("mae",),
    **options,
):
    """Weights, logs and scale after a training of this rank's half."""
    model = build()
    begin_alike(model)
    made = getattr(keras.optimizers, optimizer)(0.02, **(settings or {}))
    made = hvd.DistributedOptimizer(made, **options)
    made = made if scale is None else keras.optimizers.LossScaleOptimizer(made, initial_scale=scale)
    model.compile(made, "mse", metrics=list(metrics), jit_compile=jit_compile)
    mine = slice(comm.rank, None, comm.size)
    history = model.fit(
        x[mine], y[mine], batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    return weights_of(model), history.history, model


def check_alike(build=dense, tolerance=1e-5, sizes=2, **given):
    """Trains compiled and not; the compiled functions that were made."""
    before = compiled_functions()
    found = run_ranks(sizes, lambda comm: [trained(comm, jit, build, **given)[:2] for jit in (True, False)])
    for (weights, logs), (plain_weights, plain_logs) in found:
        for got, want in zip(weights, plain_weights, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
        for key, values in plain_logs.items():
            np.testing.assert_allclose(logs[key], values, rtol=tolerance, atol=tolerance)
    for (weights, _), _ in found[1:]:
        for got, first in zip(weights, found[0][0][0], strict=True):
            np.testing.assert_array_equal(got, first)
    return compiled_functions() - before


def compiled_functions():
    names = context.context().list_function_names()
    found = (context.context().get_function_def(name) for name in names)
    return {f.signature.name for f in found if f.attr["_XlaMustCompile"].b}


def is_step(names):
    return any("computed" in name for name in names)


def is_update(names):
    return any("update" in name for name in names)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer):
    made = check_alike(optimizer=optimizer, **SHORT)
    assert is_step(made)
    assert is_update(made)


@pytest.mark.parametrize(
    "given",
    [
        {"build": recurrent, "x": X[..., None]},
        {"build": words, "x": TOKENS},
        {"backward_passes_per_step": 2},
        {"settings": {"gradient_accumulation_steps": 2}},
        {"settings": {"clipnorm": 0.1}} | SHORT,
        {"settings": {"global_clipnorm": 0.1}} | SHORT,
        {"settings": {"use_ema": True, "ema_momentum": 0.5, "weight_decay": 0.1}} | SHORT,
        {"op": hvd.Sum, "compression": hvd.Compression.fp16} | SHORT,
        {"weight_by": "samples"},
        {"build": lambda: dense("mixed_bfloat16"), "tolerance": 2e-2},
    ],
    ids=lambda given: "-".join(given.get("settings", given)),
)
def test_features(given):
    assert is_step(check_alike(**given))


@pytest.mark.parametrize("jit_compile", [True, False])
def test_an_overflow_on_one_rank_skips_the_update_on_both(jit_compile):
    def run(comm):
        y = Y.copy()
        y[1] = 60_000  # of the second rank: its gradient is beyond float16
        return [
            trained(comm, jit_compile, lambda: dense("mixed_float16"), y=y, scale=16.0)[i] for i in (0, 2)
        ]

    (first, model), (second, _) = run_ranks(2, run)
    assert int(model.optimizer.inner_optimizer.iterations) == 2 * 3 - 2  # one batch in each epoch
    for got, want in zip(first, second, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"build": words_under_mask, "x": TOKENS, "y": DATA.random((24, 4, 3)).astype("float32")},
            "hvdext.loss",
        ),
        ({"build": normalized_over_ranks, "optimizer": "SGD"}, "it exchanges .hvdext"),
        ({"build": following}, "the step goes on with what 'adam' has changed"),
    ],
    ids=["mask", "sync batch norm", "reads what it has changed"],
)
def test_what_cannot_be_compiled_runs_as_it_is(given, why):
    with pytest.warns(UserWarning, match=f"XLA compiles only the updates of .*({why})"):
        made = check_alike(**given)
    assert not is_step(made)
    assert is_update(made) == (given.get("x") is not TOKENS)  # gradients of embeddings are sparse


def test_a_rank_without_batches_makes_the_same_updates():
    def run(comm):
        rows = 24 if comm.rank == 0 else 8
        return trained(comm, True, x=X[:rows], y=Y[:rows], callbacks=[hvd.callbacks.UnevenBatches()])[0]

    first, second = run_ranks(2, run)
    for got, want in zip(first, second, strict=True):
        np.testing.assert_array_equal(got, want)


def test_one_process_has_all_of_it_compiled_by_keras():
    assert not is_step(check_alike(sizes=1))


def test_ranks_of_which_one_compiles_are_told():
    def run(comm):
        with pytest.raises(ValueError, match=r"compiled by XLA.*True"):
            trained(comm, jit_compile=comm.rank == 1)

    run_ranks(2, run)


def test_a_collective_in_a_function_of_the_user_is_refused_by_name():
    def run(comm):
        @tf.function(jit_compile=True)
        def step(x):
            return hvd.allreduce(x, name="mine")

        with pytest.raises(
            RuntimeError, match=r"A collective .*must not stand in a function that XLA compiles"
        ):
            step(tf.ones(3))

    run_ranks(2, run)
