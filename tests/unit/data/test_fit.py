"""`model.fit` on sharded data: it runs, sees every sample and a new order per epoch."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext import data

pytestmark = pytest.mark.slow

NUM_SAMPLES = 24


class Recorder(keras.Model):
    """Trains nothing and notes the samples it sees, a list of batches."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.weights_seen = []

    def train_step(self, batch):
        x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        self.seen.append(x.numpy().ravel().astype(int).tolist())
        if sample_weight is not None:
            self.weights_seen.append(sample_weight.numpy().tolist())
        return {"loss": 0.0}


class Batches(keras.utils.PyDataset):
    """Batches of two consecutive samples."""

    def __len__(self):
        return NUM_SAMPLES // 2

    def __getitem__(self, index):
        samples = np.arange(2 * index, 2 * index + 2, dtype="float32")
        return samples[:, None], np.zeros((2, 1), "float32")


def samples():
    x = np.arange(NUM_SAMPLES, dtype="float32")[:, None]
    return x, np.zeros_like(x)


def of_arrays(rank):
    return data.shard(*samples(), batch_size=2, rank=rank, size=2)


def of_dataset(rank):
    elements = tf.data.Dataset.from_tensor_slices(samples())
    return data.shard(elements, batch_size=2, rank=rank, size=2)


def of_uncounted(rank):
    elements = tf.data.Dataset.from_tensor_slices(samples()).filter(lambda x, y: True)
    return data.shard(elements, batch_size=2, rank=rank, size=2)


def of_py_dataset(rank):
    return data.shard(Batches(), rank=rank, size=2)


def of_py_dataset_with_threads(rank):
    return data.shard(Batches(workers=2, max_queue_size=2), rank=rank, size=2)


def fit(sharded, epochs, model=None, shuffle=False, **kwargs):
    """Batches that `fit` saw, as lists."""
    model = model or Recorder()
    model.compile(run_eagerly=True)
    model.fit(sharded, epochs=epochs, shuffle=shuffle, verbose=0, **kwargs)
    return model.seen


@pytest.mark.parametrize(
    "make", [of_arrays, of_dataset, of_uncounted, of_py_dataset, of_py_dataset_with_threads]
)
def test_two_epochs_cover_all_samples_in_new_orders(make):
    ranks = [fit(make(rank), epochs=2) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [12, 12]
    for epoch in (slice(0, 6), slice(6, 12)):
        seen = np.ravel([batches[epoch] for batches in ranks])
        assert sorted(seen) == list(range(NUM_SAMPLES))
    assert ranks[0][:6] != ranks[0][6:]


@pytest.mark.parametrize("make", [of_arrays, of_dataset, of_py_dataset, of_py_dataset_with_threads])
def test_resumed_training_continues_the_orders(make):
    through = fit(make(0), epochs=3)
    resumed = make(0)
    resumed.set_epoch(1)
    assert fit(resumed, epochs=3, initial_epoch=1) == through[6:]
    assert resumed.epoch == 3


@pytest.mark.parametrize("make", [of_arrays, of_dataset, of_py_dataset])
def test_second_fit_goes_on_with_the_next_epoch(make):
    sharded = make(0)
    model = Recorder()
    fit(sharded, 1, model)
    assert fit(sharded, 1, model) == fit(make(0), epochs=2)


@pytest.mark.parametrize("make", [of_arrays, of_dataset])
def test_fits_own_shuffle_changes_nothing(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Keras says that it ignores it
        assert fit(make(0), epochs=2, shuffle=True) == fit(make(0), epochs=2)


@pytest.mark.parametrize("make", [of_arrays, of_dataset])
def test_steps_per_epoch_does_not_cut_a_pass(make):
    """Keras' epochs of 3 steps go on in the same pass of 6."""
    assert fit(make(0), epochs=4, steps_per_epoch=3) == fit(make(0), epochs=2)


@pytest.mark.parametrize("make", [of_arrays, of_dataset, of_py_dataset])
def test_a_callback_may_set_the_epoch(make):
    """As documented, for ranks that also look at the data on their own."""
    sharded = make(0)
    next(iter(sharded))
    follow = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: sharded.set_epoch(epoch))
    assert fit(sharded, epochs=2, callbacks=[follow]) == fit(make(0), epochs=2)


def test_infinite_dataset_with_steps_per_epoch():
    elements = tf.data.Dataset.from_tensor_slices(samples()).repeat()
    sharded = data.shard(elements, batch_size=2, rank=0, size=2)
    assert len(fit(sharded, epochs=2, steps_per_epoch=5)) == 10


def test_sample_weights_and_class_weights_arrive():
    x, y = samples()
    model = Recorder()
    fit(data.shard(x, y, x[:, 0] / 2, batch_size=4, rank=0, size=1), 1, model)
    np.testing.assert_allclose(np.asarray(model.weights_seen) * 2, model.seen)
    model = Recorder()
    fit(of_arrays(0), 1, model, class_weight={0: 3.0})
    assert np.unique(model.weights_seen) == [3.0]


def test_uneven_last_batches_reach_fit():
    sharded = data.shard(np.arange(7.0)[:, None], batch_size=2, uneven="keep", rank=0, size=2)
    assert [len(batch) for batch in fit(sharded, epochs=2)] == [2, 2, 2, 2]


def test_a_model_of_several_inputs_trains():
    """Inputs as a list, targets in float64, in a traced step, then evaluates and predicts."""
    inputs = [keras.Input((1,)), keras.Input((2,))]
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Concatenate()(inputs)))
    model.compile("sgd", "mse")
    x = [np.ones((NUM_SAMPLES, 1)), np.ones((NUM_SAMPLES, 2))]
    sharded = data.shard(x, np.ones(NUM_SAMPLES), batch_size=4, rank=1, size=2)
    losses = model.fit(sharded, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.evaluate(sharded, verbose=0) < losses[0]
    assert model.predict(sharded, verbose=0).shape == (12, 1)
