"""What goes on from batch to batch: followed exactly, or refused on every rank."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

ROWS, BATCH = 14, 4  # 4 batches, the last of 2 rows
X = np.zeros((ROWS, 3), "float32")
Y = np.ones((ROWS, 3), "float32")


class Noise(keras.layers.Layer):
    """Draws twice a batch, as a variational encoder or a dropout that stays on at prediction."""

    def __init__(self):
        super().__init__()
        self.generator = keras.random.SeedGenerator(7)

    def call(self, x):
        shape = keras.ops.shape(x)
        drawn = keras.random.normal(shape, seed=self.generator)
        return x + drawn * keras.random.uniform(shape, seed=self.generator)


class Global(keras.layers.Layer):
    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


class OfTensorFlow(keras.layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x))


class OnlyEager(keras.layers.Layer):
    def call(self, x):
        return x + float(np.asarray(x).size) + tf.random.normal(tf.shape(x))


def noisy(layer=Noise, **options):
    model = keras.Sequential([keras.Input((3,)), layer()])
    model.compile(loss="mse", metrics=["mae"], **options)
    return model


def data_set():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH).filter(lambda x, y: True)


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
def test_random_layers_draw_what_one_process_draws(run_eagerly):
    def run(comm):
        model = noisy(run_eagerly=run_eagerly)
        if comm.rank:
            model.layers[0].generator.state.assign([99, 99])  # that of rank 0 counts
        found = [hvd.predict(model, X, BATCH, gather="all", verbose=0)]
        found.append(hvd.evaluate(model, data_set(), verbose=0))
        found.append(hvd.predict(model, data_set(), gather="all", verbose=0))
        return found, model.layers[0].generator.state.numpy()

    plain = noisy(run_eagerly=run_eagerly)
    first, tested, second = (
        plain.predict(X, BATCH, verbose=0),
        plain.evaluate(X, Y, BATCH, verbose=0),
        plain.predict(X, BATCH, verbose=0),
    )
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 2 * ROWS
    results = run_ranks(2, run)
    for found, _ in results:
        np.testing.assert_array_equal(found[0], first)
        assert found[1] == pytest.approx(tested, rel=1e-5)
        np.testing.assert_array_equal(found[2], second)
    draws = 2 * 4 * 3
    assert [state.tolist() for _, state in results] == [[7, draws], [99, 99 + draws]]


def test_the_global_generator():
    def run(comm):
        return hvd.predict(noisy(Global), X, BATCH, gather="all", verbose=0)

    first, second = run_ranks(2, run)
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) == ROWS


def test_an_interrupted_prediction_goes_on_with_the_noise_of_its_batch(tmp_path):
    class Failing(keras.utils.PyDataset):
        fails = True

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 3 and self.fails:
                raise OSError("a disk")
            return (X[index * BATCH : (index + 1) * BATCH],)

    data = Failing()

    def run(comm):
        return hvd.predict(noisy(), data, output=tmp_path / "out", resume=True, verbose=0)

    with pytest.raises(OSError, match="the same call with resume=True goes on from row"):
        run_ranks(1, run)
    data.fails = False
    (found,) = run_ranks(1, run)
    np.testing.assert_array_equal(found, noisy().predict(X, BATCH, verbose=0))


def stateful():
    inputs = keras.Input(batch_shape=(2, 3, 1))
    return keras.Model(
        inputs, keras.layers.LSTM(2, stateful=True, kernel_initializer="ones", name="lstm")(inputs)
    )


def counted():
    class Counting(keras.layers.Layer):
        def build(self, shape):
            self.count = self.add_weight(shape=(), initializer="zeros", name="count", trainable=False)

        def call(self, x):
            self.count.assign_add(1.0)
            return x * self.count

    return noisy(Counting)


REFUSED = {
    "stateful": (stateful, np.zeros((8, 3, 1)), 2, r"layers \['lstm'\] are stateful"),
    "a counter": (counted, X, BATCH, "count' in each batch"),
    "tf.random": (lambda: noisy(OfTensorFlow), X, BATCH, "'RandomStandardNormal', whose state no"),
    "only eager": (lambda: noisy(OnlyEager, run_eagerly=True), X, BATCH, "something else the second time"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_on_every_rank(name):
    make, x, size, message = REFUSED[name]

    def run(comm):
        model = make()
        model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])
        with pytest.raises(ValueError, match=message) as caught:
            hvd.predict(model, x, size, verbose=0)
        return str(caught.value)

    first, second = run_ranks(2, run)
    assert first == second


def test_one_process_does_all():
    """Where nothing is shared, nothing is refused."""
    (found,) = run_ranks(1, lambda comm: hvd.predict(counted(), Y, BATCH, verbose=0))
    np.testing.assert_array_equal(found, counted().predict(Y, BATCH, verbose=0))
