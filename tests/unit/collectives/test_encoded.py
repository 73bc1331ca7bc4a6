"""Vectors that travel encoded: cut, scattered, combined and gathered, by hand; ranks as threads."""

import numpy as np
import pytest
import tensorflow as tf

from hvdext.collectives import encoded
from hvdext.collectives.compression import allreduce_fp16
from hvdext.testing import run_ranks


@pytest.mark.parametrize(
    ("ranks", "length", "block", "expected"),
    [(3, 7, 1, 3), (3, 6, 1, 2), (4, 1, 1, 1), (3, 7, 2, 4), (4, 300, 128, 128), (2, 300, 128, 256)],
)
def test_shards_are_whole_blocks_that_hold_everything(ranks, length, block, expected):
    assert encoded.shard_length(ranks, length, block) == expected


def test_three_ranks_get_a_shard_each_and_two_the_whole():
    vector = tf.range(1, 8)
    assert encoded.shards_of(vector, 3).numpy().tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert encoded.shards_of(vector, 3, 4).numpy().tolist() == [[1, 2, 3, 4], [5, 6, 7, 0], [0, 0, 0, 0]]
    assert encoded.shards_of(vector, 2).numpy().tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def _largest(comm, length):
    """The largest of the ranks' values, with the negative as code."""
    values = (tf.range(length) * (comm.rank + 1)) % 5
    codes = -encoded.shards_of(values, comm.size)
    rows = encoded.scatter_shards(comm, codes, "hvdext.largest", "shards")
    mine = tf.reduce_max(-rows, axis=0)
    found = encoded.gather_shards(comm, mine, tf.negative, tf.negative, "hvdext.largest.all")
    return found[:length].numpy(), sorted(comm.ledger.progress())


@pytest.mark.parametrize("size", [2, 3])
def test_any_combination_will_do(size):
    length = 8
    expected = np.max([(np.arange(length) * (rank + 1)) % 5 for rank in range(size)], axis=0)
    names = ["hvdext.largest"] if size == 2 else ["hvdext.largest.all", "hvdext.largest.shards"]
    for found, used in run_ranks(size, _largest, length):
        np.testing.assert_array_equal(found, expected)
        assert used == names


def _sums(comm):
    # Sums of whole numbers that float16 holds are exact.
    tensors = [tf.fill([3, 2], float(comm.rank + 1)), tf.constant([10.0 * comm.rank])]
    return [t.numpy() for t in allreduce_fp16(comm, tensors, "hvdext.sum", prescale=2.0, postscale=0.5)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_float16_sums(size):
    for matrix, single in run_ranks(size, _sums):
        np.testing.assert_array_equal(matrix, np.full((3, 2), sum(range(1, size + 1)), "float32"))
        np.testing.assert_array_equal(single, [10.0 * sum(range(size))])
