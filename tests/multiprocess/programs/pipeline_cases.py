"""Models that are cut into stages, and the one process that trains them uncut on the same micro-batches."""

from __future__ import annotations

import functools
import threading
from fnmatch import fnmatch

import keras
import numpy as np
import tensorflow as tf

from hvdext.placement.plan.reading import read

layers = keras.layers

ROWS = 16  # of a batch
_SEEDS = threading.Lock()  # ranks may be threads, and Keras draws seeds from one generator


def seeded(builder):
    """`builder`, which gives the same model each time, in each thread."""

    @functools.wraps(builder)
    def build():
        with _SEEDS:
            keras.utils.set_random_seed(11)
            return builder()

    return build


@seeded
def branched():
    """Skip connections over stages, dropout, batch norm, an integer input for a late stage, a nested model,
    masks.

    Two inputs and two outputs, one of which is made early.
    """
    numbers = keras.Input((6,), name="numbers")
    tokens = keras.Input((4,), dtype="int32", name="tokens")
    x = layers.Dense(8, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.01), name="first")(
        numbers
    )
    early = layers.Dense(1, name="early")(x)
    words = layers.Embedding(10, 8, mask_zero=True, name="words")(tokens)
    x = layers.Dropout(0.3, name="drop")(x)
    skip = x
    shared = layers.Dense(8, activation="relu", name="shared")
    x = shared(shared(x))
    x = layers.BatchNormalization(name="norm")(x)
    block_input = keras.Input((8,), name="block_input")
    block = layers.Dropout(0.2, name="inner_drop")(
        layers.Dense(8, activation="tanh", name="inner")(block_input)
    )
    x = keras.Model(block_input, block, name="block")(x)
    x = layers.Add(name="join")([x, skip])
    read = layers.GlobalAveragePooling1D(name="read")(words)  # by the mask
    again = keras.ops.cast(tokens, "float32")
    x = layers.Concatenate(name="all")([x, read, again])
    late = layers.Dense(3, activation="softmax", name="late")(x)
    return keras.Model([numbers, tokens], [late, early], name="branched")


@seeded
def plain():
    """A stack of four dense layers."""
    sizes = [8, 7, 6]
    hidden = [layers.Dense(n, activation="tanh", name=f"dense_{i}") for i, n in enumerate(sizes)]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(2, name="out")], name="plain")


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
}
BRANCHED_LOSS = ["sparse_categorical_crossentropy", "mse"]
BRANCHED_STAGES = {
    1: ["*"],
    2: ["first early words drop shared", "norm block/* join read cast all late"],
    4: ["first early", "words drop shared", "norm block/* read", "join cast all late"],
    8: ["first", "early words", "drop shared", "norm", "block/*", "join", "read cast all", "late"],
}


def branched_plan(hvd, places: int):
    """A plan for `branched` in which tensors go past stages."""
    graph = read(branched)
    stages = [[] for _ in range(places)]
    for path in graph.by_path:
        patterns = [line.split() for line in BRANCHED_STAGES[places]]
        matching = [i for i, some in enumerate(patterns) if any(fnmatch(path, one) for one in some)]
        stages[matching[0] if matching else 0].append(path)  # the inputs, and what Keras makes of masks
    return hvd.Plan(graph, tuple(map(tuple, stages)))


def branched_data(batches: int = 10) -> tuple[list, list]:
    """Inputs and targets of `branched` for some batches of `ROWS` rows."""
    rng = np.random.default_rng(5)
    n = batches * ROWS
    numbers = rng.normal(size=(n, 6)).astype("float32")
    tokens = rng.integers(0, 10, (n, 4)).astype("int32")
    tokens[:, 0] = rng.integers(1, 10, n)  # no row is all padding
    y = [rng.integers(0, 3, n), rng.normal(size=(n, 1)).astype("float32")]
    return [numbers, tokens], y


def plain_data(batches: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of `plain`."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(batches * ROWS, 6)).astype("float32")
    return x, rng.normal(size=(batches * ROWS, 2)).astype("float32")


def train_alone(model, optimizer, losses, x, y, microbatches: int, rows: int = ROWS):
    """The reference: one process, the uncut model, gradients averaged over the same micro-batches in turn.

    Returns the mean loss of the batches; the model is trained.
    """
    functions = [keras.losses.get(loss) for loss in losses]

    @tf.function(autograph=False)
    def step(x, y):
        sums, total = None, 0.0
        for k in range(microbatches):
            part = lambda t, k=k: tf.split(t, microbatches)[k]  # noqa: E731
            with tf.GradientTape() as tape:
                outputs = keras.tree.flatten(
                    model([part(t) for t in x] if len(x) > 1 else part(x[0]), training=True)
                )
                loss = tf.add_n(
                    [tf.reduce_mean(f(part(t), o)) for f, t, o in zip(functions, y, outputs, strict=True)]
                )
                loss = (loss + sum(model.losses)) / microbatches
            gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
            sums = gradients if sums is None else list(map(_sum, sums, gradients))
            total += loss
        optimizer.apply(sums, model.trainable_variables)
        return total

    optimizer.build(model.trainable_variables)
    x, y = keras.tree.flatten(x), keras.tree.flatten(y)
    history = []
    for start in range(0, len(x[0]), rows):
        cut = [[t[start : start + rows] for t in ts] for ts in (x, y)]
        history.append(float(step(*cut)))
    return np.mean(history)


def _sum(a, b):
    """The sum of two gradients; of sparse ones, the slices of both."""
    if not isinstance(a, tf.IndexedSlices):
        return a + b
    pairs = zip((a.values, a.indices), (b.values, b.indices), strict=True)
    return tf.IndexedSlices(*(tf.concat(pair, 0) for pair in pairs), dense_shape=a.dense_shape)


@functools.cache
def branched_reference(optimizer: str, microbatches: int = 4) -> tuple[float, dict]:
    """Mean loss and weights of `branched` after 10 batches in one process."""
    model = branched()
    loss = train_alone(model, OPTIMIZERS[optimizer](), BRANCHED_LOSS, *branched_data(), microbatches)
    return loss, values(model)


def values(model) -> dict:
    """The model's weights by layer and name; what is read from a file has longer paths."""
    return {"/".join(variable.path.split("/")[-2:]): variable.numpy() for variable in model.weights}
