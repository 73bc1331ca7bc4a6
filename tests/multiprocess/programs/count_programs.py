"""Slices that are sums, and losses that divide by unlike counts, against plain Keras with all ranks' data."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program


def _train_multi_hot(optimizer, rows):
    """A sparse matmul, whose slices are sums, after two steps of an optimizer that is not linear in them."""
    table = tf.Variable(np.full((7, 3), 0.5, "float32"), name="multi_hot_table")
    optimizer.build([table])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            outputs = keras.ops.matmul(tf.sparse.from_dense(rows), table)
            loss = tf.reduce_mean((outputs - [1.0, 2.0, 3.0]) ** 2)
        optimizer.apply([tape.gradient(loss, table)], [table])

    step()
    step()
    return table.numpy()


def _multi_hot(rank):
    return (np.random.default_rng([5, rank]).random((4, 7)) < 0.4).astype("float32")


def _run_sums(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Ftrl(0.1, name="ftrl_sums"))
    return _train_multi_hot(optimizer, _multi_hot(hvd.rank()))


def _check_sums(ranks):
    everything = np.concatenate([_multi_hot(rank) for rank in range(len(ranks))])
    expected = _train_multi_hot(keras.optimizers.Ftrl(0.1), everything)
    for table in ranks:
        np.testing.assert_allclose(table, expected, atol=1e-6)


def _train_masked(optimizer, tokens, callbacks=()):
    """Weights and the logged loss of a model whose loss divides by what a mask leaves."""
    ids = keras.Input((4,), dtype="int32")
    words = keras.layers.Embedding(5, 3, mask_zero=True)(ids)
    model = keras.Model(ids, keras.layers.Dense(5, activation="softmax")(words))
    fixed = np.random.default_rng(1)
    model.set_weights([fixed.normal(size=w.shape) for w in model.get_weights()])
    model.compile(optimizer, keras.losses.sparse_categorical_crossentropy, run_eagerly=True)
    history = model.fit(tokens, tokens, len(tokens), 2, shuffle=False, verbose=0, callbacks=list(callbacks))
    return [*model.get_weights(), np.array(history.history["loss"])]


def _tokens(rank):
    """The first rank's are nearly all padding, and it has one row less."""
    tokens = np.random.default_rng([6, rank]).integers(1, 5, (4, 4))
    return tokens if rank else tokens[1:] * [1, 0, 0, 0]


def _run_masked(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.5, name="sgd_masked"), weight_by="samples")
    return _train_masked(optimizer, _tokens(hvd.rank()), [hvd.callbacks.MetricAverageCallback()])


def _check_masked(ranks):
    everything = np.concatenate([_tokens(rank) for rank in range(len(ranks))])
    expected = _train_masked(keras.optimizers.SGD(0.5), everything)
    for got in ranks:
        for mine, right in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, right, atol=1e-6)


def _made_by(factor):
    plain = keras.losses.mean_absolute_error
    return lambda y, y_pred: factor * plain(y, y_pred)


class _Own(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.plain = keras.losses.mean_squared_error

    def call(self, y, y_pred):
        return self.plain(y, y_pred)


def _losses():
    """Of every form there is: none keeps an address that differs from process to process."""
    return {
        "a function of Keras": keras.losses.mean_squared_error,
        "a partial one": functools.partial(keras.losses.huber, delta=2.0),
        "one made by another": _made_by(tf.constant(2.0)),
        "a graph": tf.function(lambda y, y_pred: tf.reduce_mean((y - y_pred) ** 2, -1)),
        "a class": _Own(),
        "a method": _Own().call,
    }


def _train_with(loss, optimizer, rows):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.set_weights([np.ones(w.shape) for w in model.get_weights()])
    model.compile(optimizer, loss, run_eagerly=True)
    x = np.arange(16, dtype="float32").reshape(8, 2)[rows] / 16
    model.fit(x, x[:, :1] ** 2, len(x), shuffle=False, verbose=0)
    return model.get_weights()


def _run_losses(hvd):
    rows = slice(hvd.rank(), None, hvd.size())
    return {
        name: _train_with(loss, hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), rows)
        for name, loss in _losses().items()
    }


def _check_losses(ranks):
    for name, loss in _losses().items():
        expected = _train_with(loss, keras.optimizers.SGD(0.1), slice(None))
        for rank in ranks:
            for got, right in zip(rank[name], expected, strict=True):
                np.testing.assert_allclose(got, right, atol=1e-6, err_msg=name)


PROGRAMS = {
    "slices that are sums": Program(_run_sums, _check_sums),
    "masked losses": Program(_run_masked, _check_masked),
    "losses of every form": Program(_run_losses, _check_losses, (2,)),
}
