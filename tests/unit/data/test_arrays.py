"""Sharding arrays: structures, dtypes, shapes."""

import numpy as np
import pytest
import tensorflow as tf

from hvdext import data


def first(x, y=None, sample_weight=None, uneven="drop"):
    sharded = data.shard(x, y, sample_weight, batch_size=2, shuffle=False, uneven=uneven, rank=1, size=2)
    return next(sharded.as_numpy_iterator())


def test_x_alone_comes_as_a_tuple_of_one():
    (x,) = first(np.arange(8))
    assert x.tolist() == [1, 3]


def test_targets_and_weights_stay_with_their_samples():
    x, y, weight = first(np.arange(8), np.arange(8) * 10, np.arange(8) / 2)
    assert (x.tolist(), y.tolist(), weight.tolist()) == ([1, 3], [10, 30], [0.5, 1.5])


def test_nested_structures():
    x = {"a": np.arange(8), "b": [np.arange(8) + 100, (np.arange(8) + 200,)]}
    got, y = first(x, [np.arange(8), np.arange(8) * 2])
    assert got["a"].tolist() == [1, 3]
    assert got["b"][0].tolist() == [101, 103]
    assert got["b"][1][0].tolist() == [201, 203]
    assert [part.tolist() for part in y] == [[1, 3], [2, 6]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", "bool"])
def test_dtypes_are_kept(dtype):
    (x,) = first(np.ones((8, 3, 2), dtype))
    assert x.dtype == dtype
    assert x.shape == (2, 3, 2)


def test_tensors_strings_and_views():
    x, y = first(tf.range(8), np.array([f"s{i}" for i in range(8)]))
    assert (x.tolist(), y.tolist()) == ([1, 3], [b"s1", b"s3"])
    (view,) = first(np.arange(16)[::2])
    assert view.tolist() == [2, 6]


def test_batch_dimension_is_static_unless_batches_differ():
    x = np.zeros((9, 3), "float32")
    specs = {
        uneven: data.shard(x, batch_size=2, uneven=uneven, rank=0, size=2).element_spec[0].shape
        for uneven in ("drop", "repeat", "keep")
    }
    assert specs["drop"] == (2, 3)
    assert specs["repeat"] == (2, 3)
    assert specs["keep"].as_list() == [None, 3]


def test_orders_follow_numpy():
    """The documented order: `default_rng([seed, epoch]).permutation`, every size-th from r on."""
    sharded = data.shard(np.arange(12), batch_size=3, seed=9, rank=1, size=2)
    for epoch in range(3):
        order = np.random.default_rng([9, epoch]).permutation(12)
        got = np.concatenate([x for (x,) in sharded.as_numpy_iterator()])
        np.testing.assert_array_equal(got, order[1::2])
