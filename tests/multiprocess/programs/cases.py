"""What is trained: each case once by plain Keras in one process, and once shared out over the ranks.

Nothing here imports hvdext unless a case is trained on ranks, so that the reference stays what it is called.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

ROWS = 12  # of one batch over all ranks: 2, 3 and 4 ranks get equal shares

optimizers = keras.optimizers


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train.

    Attributes:
        optimizer: makes the optimizer.
        options: makes the arguments of `hvd.DistributedOptimizer`, out of hvdext itself.
        loop: trains a compiled model on batches; see `fit`.
        compile: arguments of `model.compile`.
        passes: batches of `ROWS` rows that make one update.
        keras_accumulates: the reference, too, gets these batches one by one.
        reference_scale: what the reference's loss is multiplied by.
        weights: sample weights, (updates, passes, ROWS); None: none.
        reference_rows: of the last batch, how many rows the reference gets; the others have no weight.
        floatx: the type of weights and data.
        policy: Keras' precision policy; default: `floatx`.
        tolerance: of the largest difference, relative to the largest value of a tensor.
        updates: of the weights.
        model: makes the model for some batches.
        sizes: with how many ranks it runs under horovodrun.
        collectives: for one update: one bucket of dense gradients, values and indices of the sparse one.
    """

    optimizer: Callable[[], optimizers.Optimizer]
    options: Callable[[Any], dict] = lambda hvd: {}
    loop: Callable = field(default=lambda *args: fit(*args))
    compile: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1
    keras_accumulates: bool = False
    reference_scale: float = 1.0
    weights: np.ndarray | None = None
    reference_rows: int = ROWS
    floatx: str = "float64"
    policy: str | None = None
    tolerance: float = 1e-10
    updates: int = 10
    collectives: int = 3
    model: Callable = field(default=lambda batches: with_embedding(batches))
    sizes: tuple[int, ...] = (2, 4)


@dataclass(frozen=True)
class Batches:
    """Arrays of shape (steps, rows, ...); `weights` may be None."""

    numbers: np.ndarray
    tokens: np.ndarray
    y: np.ndarray
    weights: np.ndarray | None


# -- training ------------------------------------------------------------------------------------------


def train_alone(case: Case) -> dict:
    """The reference: plain Keras, one process, the whole batch."""
    keras.config.set_floatx(case.floatx)
    return _train(case, _reference_batches(case), case.optimizer(), case.reference_scale)


def train_shared(case: Case) -> dict:
    """This rank's part of the same training. `keras.config.floatx()` is set by the caller."""
    import hvdext as hvd

    before = _grad_calls(hvd)
    optimizer = hvd.DistributedOptimizer(case.optimizer(), **case.options(hvd))
    result = _train(case, _share(case, hvd.rank(), hvd.size()), optimizer, 1.0)
    result["calls"] = _grad_calls(hvd) - before
    return result


def train_on_share_alone(case: Case, rank: int, size: int) -> dict:
    """What becomes of a rank that exchanges nothing. `keras.config.floatx()` is set by the caller."""
    return _train(case, _share(case, rank, size), case.optimizer(), 1.0)


def _train(case, batches, optimizer, scale):
    keras.config.set_dtype_policy(case.policy or case.floatx)
    try:
        model = case.model(batches)
        model.set_weights(initial_weights(model))
        model.compile(optimizer, "mse", loss_weights=scale, **case.compile)
        case.loop(model, batches)
    finally:
        keras.config.set_dtype_policy(case.floatx)
    return {
        "weights": model.get_weights(),
        "optimizer": [variable.numpy() for variable in model.optimizer.variables],
        "iterations": int(model.optimizer.iterations),
    }


def _grad_calls(hvd):
    traffic = hvd.traffic()
    return traffic["grad"].calls if "grad" in traffic else 0


def with_embedding(batches):
    """Two dense layers, and an embedding whose gradients are sparse."""
    numbers = keras.Input(batches.numbers.shape[2:], name="numbers")
    tokens = keras.Input(batches.tokens.shape[2:], dtype="int32", name="tokens")
    words = keras.layers.Embedding(7, 2, name="words")(tokens)
    joined = keras.layers.Concatenate()([numbers, keras.layers.Flatten()(words)])
    hidden = keras.layers.Dense(5, activation="tanh", name="hidden")(joined)
    return keras.Model([numbers, tokens], keras.layers.Dense(2, name="out")(hidden))


def dense_only(batches):
    """Two dense layers; the tokens count as numbers."""
    numbers = keras.Input(batches.numbers.shape[2:], name="numbers")
    tokens = keras.Input(batches.tokens.shape[2:], name="tokens")
    joined = keras.layers.Concatenate()([numbers, tokens])
    hidden = keras.layers.Dense(5, activation="tanh", name="hidden")(joined)
    return keras.Model([numbers, tokens], keras.layers.Dense(2, name="out")(hidden))


def initial_weights(model) -> list[np.ndarray]:
    """The same for every process that asks."""
    generator = np.random.default_rng(7)
    return [generator.normal(scale=0.5, size=weight.shape) for weight in model.get_weights()]


# -- data ----------------------------------------------------------------------------------------------


def _whole(case):
    generator = np.random.default_rng(11)
    shape = (case.updates, case.passes, ROWS)
    numbers = generator.normal(size=(*shape, 4))
    # Few words in many places: every batch repeats some of them.
    tokens = generator.integers(0, 5, size=(*shape, 3))
    y = np.stack([np.sin(numbers.sum(-1)) + tokens[..., 0], numbers[..., 0] - tokens[..., 1]], axis=-1)
    return [numbers.astype(case.floatx), tokens, y.astype(case.floatx), case.weights]


def _share(case, rank, size):
    """Rank r's rows of every batch: r, r + size, ..."""

    def cut(array):
        mine = array[:, :, rank::size]
        return mine.reshape(-1, *mine.shape[2:])

    return Batches(*[array if array is None else cut(array) for array in _whole(case)])


def _reference_batches(case):
    passes = 1 if case.keras_accumulates else case.passes

    def join(array):
        return array.reshape(case.updates * case.passes // passes, passes * ROWS, *array.shape[3:])

    numbers, tokens, y, weights = [array if array is None else join(array) for array in _whole(case)]
    return Batches(numbers, tokens, y, weights if case.reference_rows == ROWS else None)


# -- loops ---------------------------------------------------------------------------------------------


def fit(model, batches, rows=None, **options):
    """`model.fit`; `rows`: keep so many rows of all."""
    flat = [None if a is None else a.reshape(-1, *a.shape[2:])[:rows] for a in vars(batches).values()]
    numbers, tokens, y, weights = flat
    size = batches.y.shape[1]
    model.fit([numbers, tokens], y, size, sample_weight=weights, shuffle=False, verbose=0, **options)


def fit_without_padding(model, batches):
    """As `fit`; one process gets the last batch without the rows that only fill it up."""
    alone = batches.weights is None
    fit(model, batches, rows=len(batches.y) * ROWS - (ROWS - UNEVEN_ROWS) if alone else None)


def train_on_batch(model, batches):
    """`model.train_on_batch` for every batch."""
    for numbers, tokens, y in zip(batches.numbers, batches.tokens, batches.y, strict=True):
        model.train_on_batch([numbers, tokens], y)


def custom(model, batches, *, graph: bool, step: Callable):
    """A loop of the user's own; `step(model, inputs, y)` computes gradients and applies them."""
    run = tf.function(functools.partial(step, model)) if graph else functools.partial(step, model)
    for numbers, tokens, y in zip(batches.numbers, batches.tokens, batches.y, strict=True):
        run([tf.constant(numbers), tf.constant(tokens)], tf.constant(y))


def step_with_apply(model, inputs, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((y - model(inputs, training=True)) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    model.optimizer.apply(gradients, model.trainable_variables)


def step_with_apply_gradients(model, inputs, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((y - model(inputs, training=True)) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


# -- the table -----------------------------------------------------------------------------------------


def _plain(name, **arguments):
    return lambda: getattr(optimizers, name)(**arguments)


def _multi():
    choice = optimizers.OptimizerMap(
        optimizers.SGD(0.05), {"hidden/.*": optimizers.Adam(0.02), "words/.*": optimizers.RMSprop(0.01)}
    )
    return optimizers.MultiOptimizer(choice)


def loss_scale(**arguments):
    return optimizers.LossScaleOptimizer(optimizers.Adam(0.02, **arguments), dynamic_growth_steps=4)


# Every optimizer class of Keras, by name; those that the installed Keras lacks are left out.
OPTIMIZERS = {
    "Adadelta": _plain("Adadelta", learning_rate=1.0),
    "Adafactor": _plain("Adafactor", learning_rate=0.05),
    "Adagrad": _plain("Adagrad", learning_rate=0.1),
    "Adam": _plain("Adam", learning_rate=0.02),
    "AdamW": _plain("AdamW", learning_rate=0.02, weight_decay=0.1),
    "Adamax": _plain("Adamax", learning_rate=0.02),
    "Ftrl": _plain("Ftrl", learning_rate=0.1),
    "Lamb": _plain("Lamb", learning_rate=0.02),
    "Lion": _plain("Lion", learning_rate=0.02),
    "LossScaleOptimizer": loss_scale,
    "MultiOptimizer": _multi,
    "Muon": _plain("Muon", learning_rate=0.02),
    "Nadam": _plain("Nadam", learning_rate=0.02),
    "RMSprop": _plain("RMSprop", learning_rate=0.02),
    "SGD": _plain("SGD", learning_rate=0.1),
    "ScheduleFreeAdamW": _plain("ScheduleFreeAdamW", learning_rate=0.05, warmup_steps=3),
}

sgd = _plain("SGD", learning_rate=0.1, momentum=0.9)
adam = _plain("Adam", learning_rate=0.02, epsilon=0.1)


def _accumulating(optimizer, average, **case):
    return Case(
        optimizer=optimizer,
        options=lambda hvd: {"backward_passes_per_step": 3, "average_aggregated_gradients": average},
        passes=3,
        reference_scale=1.0 if average else 3.0,
        **case,
    )


def _uneven_weights():
    return np.random.default_rng(5).uniform(0, 3, size=(10, 1, ROWS))


UNEVEN_ROWS = 7  # in the last batch; the other rows of its `ROWS` fill it up


def _padding_weights():
    """1, and in the last batch 12/7 for seven rows and 0 for five: the mean over seven rows."""
    weights = np.ones((10, 1, ROWS))
    weights[-1] = np.where(np.arange(ROWS) < UNEVEN_ROWS, ROWS / UNEVEN_ROWS, 0)
    return weights


def _schedule():
    return optimizers.schedules.ExponentialDecay(0.1, decay_steps=2, decay_rate=0.7)


OPTIONS = {
    "SGD momentum": Case(optimizer=sgd),
    "SGD Nesterov": Case(optimizer=_plain("SGD", learning_rate=0.05, momentum=0.9, nesterov=True)),
    # Keras itself cannot train this one on sparse gradients.
    "RMSprop centred": Case(
        optimizer=_plain("RMSprop", learning_rate=0.02, momentum=0.5, centered=True),
        model=dense_only,
        collectives=1,
    ),
    "Adam amsgrad": Case(optimizer=_plain("Adam", learning_rate=0.02, amsgrad=True)),
    "float32 SGD": Case(optimizer=sgd, floatx="float32", tolerance=1e-5),
    "float32 Adam": Case(optimizer=adam, floatx="float32", tolerance=1e-5),
    "accumulation summed, SGD": _accumulating(sgd, average=False),
    "accumulation averaged, SGD": _accumulating(sgd, average=True),
    "accumulation summed, Adam": _accumulating(adam, average=False),
    "accumulation averaged, RMSprop": _accumulating(OPTIMIZERS["RMSprop"], average=True),
    "accumulation, schedule, EMA, decay": _accumulating(
        lambda: optimizers.Adam(
            _schedule(), weight_decay=0.1, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=4
        ),
        average=True,
    ),
    "accumulation, clipped": _accumulating(
        _plain("SGD", learning_rate=0.1, global_clipnorm=0.5), average=False
    ),
    "accumulation, loss scale": _accumulating(loss_scale, average=True),
    "accumulation, sparse as dense": Case(
        optimizer=_plain("SGD", learning_rate=0.1),
        options=lambda hvd: {
            "backward_passes_per_step": 3,
            "average_aggregated_gradients": True,
            "sparse_as_dense": True,
        },
        passes=3,
        collectives=1,
    ),
    "accumulation in Keras, SGD": Case(
        optimizer=_plain("SGD", learning_rate=0.1, momentum=0.9, gradient_accumulation_steps=3),
        passes=3,
        keras_accumulates=True,
        collectives=1,
    ),
    "accumulation in Keras, clipped Adam": Case(
        optimizer=_plain("Adam", learning_rate=0.02, gradient_accumulation_steps=3, global_clipnorm=0.5),
        passes=3,
        keras_accumulates=True,
        collectives=1,
    ),
    "uneven sample weights": Case(optimizer=adam, weights=_uneven_weights()),
    "uneven last batch": Case(
        optimizer=adam, weights=_padding_weights(), reference_rows=UNEVEN_ROWS, loop=fit_without_padding
    ),
    "sparse as dense": Case(
        optimizer=_plain("SGD", learning_rate=0.1),
        options=lambda hvd: {"sparse_as_dense": True},
        collectives=1,
    ),
    "global_clipnorm": Case(optimizer=_plain("SGD", learning_rate=0.3, global_clipnorm=0.5)),
    "clipnorm": Case(optimizer=_plain("Adam", learning_rate=0.02, clipnorm=0.1)),
    "clipvalue": Case(optimizer=_plain("SGD", learning_rate=0.5, momentum=0.5, clipvalue=0.05)),
    "EMA": Case(
        optimizer=_plain(
            "Adam", learning_rate=0.05, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=4
        )
    ),
    "weight decay": Case(optimizer=_plain("SGD", learning_rate=0.1, momentum=0.5, weight_decay=0.05)),
    "schedule": Case(optimizer=lambda: optimizers.SGD(_schedule(), momentum=0.5)),
    # Nor this one.
    "loss_scale_factor": Case(
        optimizer=_plain("Adam", learning_rate=0.02, loss_scale_factor=10.0), model=dense_only, collectives=1
    ),
    "loss_scale_factor, accumulation": _accumulating(
        _plain("Adam", learning_rate=0.02, epsilon=0.1, loss_scale_factor=10.0),
        average=False,
        model=dense_only,
        collectives=1,
    ),
    "steps_per_execution": Case(optimizer=adam, compile={"steps_per_execution": 3}),
    "run_eagerly": Case(optimizer=adam, compile={"run_eagerly": True}),
    "run_eagerly, accumulation": _accumulating(adam, average=False, compile={"run_eagerly": True}),
    "train_on_batch": Case(optimizer=adam, loop=train_on_batch),
    "custom loop, apply, graph": Case(
        optimizer=adam, loop=functools.partial(custom, graph=True, step=step_with_apply)
    ),
    "custom loop, apply, eager": Case(
        optimizer=adam, loop=functools.partial(custom, graph=False, step=step_with_apply)
    ),
    "custom loop, apply_gradients, graph": Case(
        optimizer=sgd, loop=functools.partial(custom, graph=True, step=step_with_apply_gradients)
    ),
    "custom loop, apply_gradients, eager": Case(
        optimizer=sgd, loop=functools.partial(custom, graph=False, step=step_with_apply_gradients)
    ),
    "mixed_bfloat16": Case(optimizer=sgd, floatx="float32", policy="mixed_bfloat16", tolerance=2e-2),
    # A small first scale: one that overflows at the start would skip steps.
    "mixed_float16": Case(
        optimizer=lambda: optimizers.LossScaleOptimizer(sgd(), initial_scale=256.0),
        floatx="float32",
        policy="mixed_float16",
        tolerance=5e-3,
    ),
    "mixed_float16, accumulation": _accumulating(
        lambda: optimizers.LossScaleOptimizer(adam(), initial_scale=256.0),
        average=True,
        floatx="float32",
        policy="mixed_float16",
        tolerance=5e-3,
    ),
}

# These differ from their neighbours in ways that the number of ranks does not touch.
_TWO_RANKS_ONLY = {
    "SGD Nesterov",
    "SGD momentum",
    "RMSprop centred",
    "Adam amsgrad",
    "float32 Adam",
    "accumulation summed, Adam",
    "accumulation averaged, RMSprop",
    "accumulation, schedule, EMA, decay",
    "accumulation, clipped",
    "EMA",
    "weight decay",
    "accumulation, loss scale",
    "accumulation, sparse as dense",
    "accumulation in Keras, clipped Adam",
    "clipvalue",
    "schedule",
    "loss_scale_factor",
    "loss_scale_factor, accumulation",
    "run_eagerly, accumulation",
    "custom loop, apply, eager",
    "custom loop, apply_gradients, graph",
    "custom loop, apply_gradients, eager",
    "mixed_bfloat16",
    "mixed_float16, accumulation",
    "clipnorm",
    "steps_per_execution",
    "train_on_batch",
}
OPTIONS |= {name: dataclasses.replace(OPTIONS[name], sizes=(2,)) for name in _TWO_RANKS_ONLY}

# What an optimizer makes of combined gradients has nothing to do with the number of ranks.
CASES = {
    name: Case(optimizer=factory, sizes=(2, 4) if name in ("SGD", "Adam") else (2,))
    for name, factory in OPTIMIZERS.items()
    if hasattr(optimizers, name)
} | OPTIONS
CASES["compiled by XLA"] = Case(
    optimizer=lambda: optimizers.Adam(0.05, use_ema=True), compile={"jit_compile": True}, sizes=(2,)
)


# -- the comparison ------------------------------------------------------------------------------------


def check(case: Case, ranks: list[dict], reference: dict) -> None:
    """Every rank holds what one process would hold, and all ranks hold the very same bits."""
    _check_moved(case, reference)
    for rank in ranks:
        assert rank["iterations"] == reference["iterations"] == case.updates
        assert rank["calls"] == case.updates * case.collectives
        _check_close(rank["weights"], reference["weights"], case.tolerance)
        _check_close(rank["optimizer"], reference["optimizer"], case.tolerance)
        for key in ("weights", "optimizer"):
            for mine, first in zip(rank[key], ranks[0][key], strict=True):
                np.testing.assert_array_equal(mine, first)


def _check_close(values, expected, tolerance):
    for value, wanted in zip(values, expected, strict=True):
        value, wanted = np.asarray(value, np.float64), np.asarray(wanted, np.float64)
        assert value.shape == wanted.shape
        largest = np.max(np.abs(wanted), initial=0)
        assert np.max(np.abs(value - wanted), initial=0) <= tolerance * largest


def _check_moved(case, reference):
    """A reference that does not train would prove nothing."""
    generator = np.random.default_rng(7)
    for weight in reference["weights"]:
        start = generator.normal(scale=0.5, size=np.shape(weight))
        moved = np.max(np.abs(np.asarray(weight) - start))
        assert moved > 5 * max(case.tolerance, 1e-3) * np.max(np.abs(start)), "the reference stood still"
