"""Sharding a tf.data.Dataset: elements, batches, unknown and infinite lengths."""

import itertools
import logging

import numpy as np
import pytest
import tensorflow as tf

from hvdext import data


def uncounted(num_elements):
    return tf.data.Dataset.range(num_elements).filter(lambda _: True)


def listed(sharded):
    return [element.tolist() for element in sharded.as_numpy_iterator()]


def test_without_batch_size_elements_are_dealt():
    elements = tf.data.Dataset.range(7)
    dealt = [data.shard(elements, shuffle=False, rank=rank, size=3) for rank in range(3)]
    assert [listed(one) for one in dealt] == [[0, 3], [1, 4], [2, 5]]
    assert (dealt[0].num_samples, dealt[0].dropped) == (2, 1)
    assert listed(dealt[1].map(lambda i: i * 10).batch(2)) == [[10, 40]]


def test_batches_are_dealt_whole():
    batches = tf.data.Dataset.range(8).batch(2)
    dealt = [listed(data.shard(batches, mode="slice", shuffle=False, rank=rank, size=2)) for rank in range(2)]
    assert dealt == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize("uneven", ["drop", "repeat"])
def test_elements_are_reshuffled_and_covered(uneven):
    dealt = [data.shard(tf.data.Dataset.range(11), uneven=uneven, rank=rank, size=3) for rank in range(3)]
    epochs = [[i for one in dealt for i in listed(one)] for _ in range(3)]
    assert {len(epoch) for epoch in epochs} == {9 if uneven == "drop" else 12}
    assert all(len(set(epoch)) == min(len(epoch), 11) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_elements", [24, 31])
def test_unknown_length_gives_equal_steps(size, num_elements):
    def epoch(batch_size, rank, size):
        sharded = data.shard(uncounted(num_elements), batch_size=batch_size, rank=rank, size=size)
        return listed(sharded)

    steps = list(zip(*(epoch(2, rank, size) for rank in range(size)), strict=True))
    alone = epoch(2 * size, 0, 1)
    assert [sorted(np.ravel(step)) for step in steps] == [sorted(batch) for batch in alone]
    assert len(steps) == num_elements // (2 * size)


def test_unknown_length_without_batch_size():
    structured = uncounted(7).map(lambda i: {"a": i, "b": (i * 10, tf.range(i))})
    sharded = data.shard(structured, shuffle=False, rank=1, size=3)
    elements = [(e["a"], e["b"][0], len(e["b"][1])) for e in sharded.as_numpy_iterator()]
    assert elements == [(1, 10, 1), (4, 40, 4)]
    assert (sharded.num_samples, sharded.dropped, sharded.total_samples) == (None, None, None)
    assert sharded.cardinality() == tf.data.UNKNOWN_CARDINALITY


def test_unknown_length_is_reported_on_rank_0(caplog):
    with caplog.at_level(logging.WARNING, "hvdext.data"):
        for rank in range(2):
            data.shard(uncounted(9), batch_size=4, rank=rank, size=2)
    assert caplog.messages == [
        "The data set does not know how many elements it has: up to 7 at the end of every epoch "
        "are left out, so that 2 ranks take equal steps."
    ]


def test_infinite_data_is_dealt_forever():
    endless = tf.data.Dataset.range(12).repeat()
    plain = [data.shard(endless, batch_size=3, shuffle=False, rank=rank, size=2) for rank in range(2)]
    assert plain[0].cardinality() == tf.data.INFINITE_CARDINALITY
    assert [listed(one.take(3)) for one in plain] == [
        [[0, 2, 4], [6, 8, 10], [0, 2, 4]],
        [[1, 3, 5], [7, 9, 11], [1, 3, 5]],
    ]
    shuffled = [data.shard(endless, batch_size=3, shuffle_buffer=4, rank=rank, size=2) for rank in range(2)]
    first = [listed(one.take(40)) for one in shuffled]
    counts = np.bincount(np.ravel(first), minlength=12)
    # 240 samples of 12 kinds: the buffer of 4 holds back few of the last round.
    assert counts.min() >= 19
    assert counts.max() <= 21
    assert plain[0].dropped == plain[0].repeated == 0


def test_shuffle_buffer_bounds_the_shuffling():
    sharded = data.shard(tf.data.Dataset.range(100), shuffle_buffer=5, rank=0, size=1)
    order = listed(sharded)
    assert order != sorted(order)
    assert all(element <= place + 4 for place, element in enumerate(order))


def test_options_of_the_source_are_kept_and_order_is_deterministic():
    options = tf.data.Options()
    options.threading.private_threadpool_size = 3
    options.deterministic = False
    sharded = data.shard(tf.data.Dataset.range(8).with_options(options), rank=0, size=2)
    assert sharded.options().threading.private_threadpool_size == 3
    assert sharded.options().deterministic


def test_ragged_and_sparse_elements():
    rows = tf.RaggedTensor.from_row_lengths(tf.range(10), [1, 2, 3, 4])
    ragged = data.shard(tf.data.Dataset.from_tensor_slices(rows), shuffle=False, batch_size=2, rank=1, size=2)
    assert [batch.to_list() for batch in ragged] == [[[1, 2], [6, 7, 8, 9]]]
    sparse = tf.data.Dataset.from_tensor_slices(tf.sparse.eye(4)).filter(lambda _: True)
    (batch,) = data.shard(sparse, shuffle=False, batch_size=2, rank=1, size=2)
    assert tf.sparse.to_dense(batch).numpy().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_known_length_is_len():
    sharded = data.shard(tf.data.Dataset.range(30), batch_size=4, rank=0, size=3)
    assert len(sharded) == sharded.cardinality() == 2
    assert len(list(itertools.islice(sharded, 5))) == 2
