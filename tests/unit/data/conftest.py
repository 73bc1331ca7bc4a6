"""What the tests of sharding share."""

import numpy as np
import pytest
import tensorflow as tf

from hvdext import data


def _as_lists(sharded):
    return [batch[0].tolist() for batch in sharded.as_numpy_iterator()]


def _arrays(num_samples, **kwargs):
    return data.shard(np.arange(num_samples), np.zeros(num_samples), **kwargs)


def _dataset(num_samples, **kwargs):
    elements = tf.data.Dataset.range(num_samples).map(lambda i: (i, 0))
    return data.shard(elements, **kwargs)


@pytest.fixture(params=[_arrays, _dataset], ids=["arrays", "tf.data"])
def shard_range(request):
    """Shards `range(num_samples)`, as arrays and as a tf.data.Dataset with a batch size."""
    return request.param


@pytest.fixture
def epochs_of():
    """Batches of x as lists, one list per epoch."""

    def epochs_of(sharded, epochs):
        return [_as_lists(sharded) for _ in range(epochs)]

    return epochs_of
