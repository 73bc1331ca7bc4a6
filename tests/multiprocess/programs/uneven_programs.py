"""Ranks with different numbers of batches per epoch, against NumPy. The same for threads and horovodrun."""

from __future__ import annotations

from functools import partial

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program

BATCH, FEATURES, EPOCHS = 2, 3, 4
COUNTS = {2: [(5, 3), (5, 0)], 4: [(1, 7, 4, 4)]}
RATE, MOMENTUM = 0.1, 0.5


def samples(rank, batches):
    """float32 inputs and targets that differ from rank to rank."""
    generator = np.random.default_rng([7, rank])
    x = generator.normal(size=(batches * BATCH, FEATURES)).astype("float32")
    return x, generator.normal(size=(batches * BATCH, 1)).astype("float32")


def start():
    return np.full((FEATURES, 1), 0.1)


def expected(counts, epochs=EPOCHS):
    """Momentum SGD on the mean over the ranks that have a batch: weights, updates."""
    weights, velocity, updates = start()[:, 0], np.zeros(FEATURES), 0
    shards = [samples(rank, batches) for rank, batches in enumerate(counts)]
    for _ in range(epochs):
        for step in range(max(counts)):
            gradients = [
                gradient(weights, x, y, step)
                for (x, y), batches in zip(shards, counts, strict=True)
                if step < batches
            ]
            velocity = MOMENTUM * velocity - RATE * np.mean(gradients, axis=0)
            weights = weights + velocity
            updates += 1
    return weights, updates


def gradient(weights, x, y, step):
    """Of the mean squared error on one batch."""
    rows = slice(step * BATCH, (step + 1) * BATCH)
    return 2 * x[rows].T @ (x[rows] @ weights - y[rows, 0]) / BATCH


def make_model():
    model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([start()])
    return model


class Batches(keras.utils.PyDataset):
    """One rank's batches, in order."""

    def __init__(self, x, y):
        super().__init__()
        self._x, self._y = x, y

    def __len__(self):
        return len(self._x) // BATCH

    def __getitem__(self, index):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self._x[rows], self._y[rows]


def _endless(x, y):
    while True:
        for begin in range(0, len(x), BATCH):
            yield x[begin : begin + BATCH], y[begin : begin + BATCH]


def _once(x, y):
    for begin in range(0, len(x), BATCH):
        yield x[begin : begin + BATCH], y[begin : begin + BATCH]


def _from_generator(x, y):
    signature = (tf.TensorSpec((None, FEATURES)), tf.TensorSpec((None, 1)))
    return tf.data.Dataset.from_generator(lambda: _once(x, y), output_signature=signature)


def inputs(kind, x, y):
    """What `fit` is given; a rank without any batch passes an empty dataset where Keras wants some."""
    if kind == "arrays":
        return {"x": x, "y": y, "batch_size": BATCH}
    if kind == "from_generator":  # of unknown length
        return {"x": _from_generator(x, y)}
    if kind == "tf.data" or not len(x):
        return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)}
    if kind == "generator":
        return {"x": _endless(x, y), "steps_per_epoch": len(x) // BATCH}
    return {"x": Batches(x, y)}


KINDS = ("arrays", "tf.data", "from_generator", "generator", "PyDataset")


class _AtEpochEnd(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights()[0].ravel())


def fit(hvd, counts, kind):
    """(weights after each epoch, updates) of this rank."""
    model = make_model()
    optimizer = keras.optimizers.SGD(RATE, momentum=MOMENTUM, name="uneven")
    model.compile(hvd.DistributedOptimizer(optimizer), "mse")
    seen = _AtEpochEnd()
    model.fit(
        **inputs(kind, *samples(hvd.rank(), counts[hvd.rank()])),
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.UnevenBatches(),
            hvd.callbacks.MetricAverageCallback(),
            seen,
        ],
    )
    return seen.weights, int(optimizer.iterations)


def _run_fit(kind, hvd):
    return [fit(hvd, counts, kind) for counts in COUNTS[hvd.size()]]


def _check_fit(ranks):
    for case, counts in enumerate(COUNTS[len(ranks)]):
        epochs, updates = ranks[0][case]
        for rank in ranks[1:]:
            np.testing.assert_array_equal(rank[case][0], epochs)
            assert rank[case][1] == updates
        assert updates == expected(counts)[1]
        assert len(epochs) == EPOCHS
        for epoch, weights in enumerate(epochs):
            np.testing.assert_allclose(weights, expected(counts, epoch + 1)[0], atol=1e-5)


# -- a custom loop, and the engine's own join --------------------------------------------------------


def _run_loop(hvd):
    counts = COUNTS[hvd.size()][0]
    x, y = samples(hvd.rank(), counts[hvd.rank()])
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(RATE, momentum=MOMENTUM, name="loop"), uneven_batches=True
    )
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)

    for _ in range(EPOCHS):
        for batch in _once(x, y):
            step(*batch)
        hvd.join(optimizer)
    return model.get_weights()[0].ravel(), int(optimizer.iterations)


def _check_loop(ranks):
    weights, updates = expected(COUNTS[len(ranks)][0])
    for found, count in ranks:
        np.testing.assert_array_equal(found, ranks[0][0])
        np.testing.assert_allclose(found, weights, atol=1e-5)
        assert count == updates


def _run_engine_join(hvd):
    sums, last = [], []
    for first in range(3):  # again and again
        mine = 1 + (hvd.rank() + first) % hvd.size()  # steps; another rank is last each time
        for step in range(mine):
            sums.append(hvd.allreduce(np.float32(10 * step + hvd.rank() + 1), op=hvd.Sum).numpy())
        last.append(hvd.join())
    return sums, last


def _check_engine_join(ranks):
    size = len(ranks)
    for rank, (sums, last) in enumerate(ranks):
        wanted = []
        for first in range(3):
            steps = [1 + (r + first) % size for r in range(size)]
            wanted += [
                sum(10 * step + r + 1 for r in range(size) if step < steps[r]) for step in range(steps[rank])
            ]
        assert sums == wanted
        assert last == [(size - 1 - first) % size for first in range(3)]


PROGRAMS = {
    **{
        f"uneven batches, {kind}": Program(
            partial(_run_fit, kind), _check_fit, sizes=(2, 4) if kind in ("arrays", "generator") else (2,)
        )
        for kind in KINDS
    },
    "uneven batches, custom loop": Program(_run_loop, _check_loop, sizes=(2, 4)),
    "the engine's join": Program(_run_engine_join, _check_engine_join, sizes=(2, 4)),
}
