"""Every error of `shard` names argument, rule and value, and is the same on all ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext import data

RANGE = np.arange(12)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return np.zeros((2, 1))


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return np.zeros((2, 1))


def dataset(num_elements):
    return tf.data.Dataset.range(num_elements)


def uncounted():
    return tf.data.Dataset.range(12).filter(lambda _: True)


CASES = [
    (
        {"x": RANGE, "batch_size": 2, "mode": "foo"},
        "`mode` must be one of 'scatter', 'slice'. Received: mode='foo'.",
    ),
    (
        {"x": RANGE, "batch_size": 2, "uneven": None},
        "`uneven` must be one of 'drop', 'repeat', 'keep'. Received: uneven=None.",
    ),
    (
        {"x": RANGE, "batch_size": 2, "seed": None},
        "`seed` must be an integer of at least 0. Received: seed=None.",
    ),
    (
        {"x": RANGE, "batch_size": 2, "seed": -1},
        "`seed` must be an integer of at least 0. Received: seed=-1.",
    ),
    (
        {"x": RANGE},
        "`batch_size` must be given for arrays. Received: batch_size=None.",
    ),
    (
        {"x": RANGE, "batch_size": 0},
        "`batch_size` must be an integer of at least 1. Received: batch_size=0.",
    ),
    (
        {"x": dataset(12), "batch_size": 2.5},
        "`batch_size` must be an integer of at least 1. Received: batch_size=2.5.",
    ),
    (
        {"x": RANGE, "batch_size": 4},
        "`batch_size` must be at most 12 samples // 4 ranks = 3 with uneven='drop', which uses "
        "full batches only (uneven='repeat' fills them, uneven='keep' makes a smaller one). "
        "Received: batch_size=4.",
    ),
    (
        {"x": RANGE[:3], "batch_size": 1, "uneven": "repeat"},
        "`x` must hold at least as many samples as there are ranks. Received: 3 samples for size=4.",
    ),
    (
        {"x": RANGE[:0], "batch_size": 1},
        "`x` must hold at least as many samples as there are ranks. Received: 0 samples for size=4.",
    ),
    (
        {"x": dataset(3)},
        "`x` must hold at least as many elements as there are ranks. Received: 3 elements for size=4.",
    ),
    (
        {"x": Batches()},
        "`x` must hold at least as many batches as there are ranks. Received: 3 batches for size=4.",
    ),
    (
        {"x": RANGE, "y": RANGE[:5], "batch_size": 1},
        "`x`, `y` and `sample_weight` must have the same number of samples along their first axes. "
        "Received: x: [12], y: [5].",
    ),
    (
        {"x": {"a": RANGE, "b": RANGE[:9]}, "batch_size": 1},
        "`x`, `y` and `sample_weight` must have the same number of samples along their first axes. "
        "Received: x: [9, 12].",
    ),
    (
        {"x": (), "batch_size": 1},
        "`x`, `y` and `sample_weight` must have the same number of samples along their first axes. "
        "Received: x: [].",
    ),
    (
        {"x": RANGE, "sample_weight": RANGE, "batch_size": 1},
        "`sample_weight` must come with `y`. Received: a sample_weight, and y=None.",
    ),
    (
        {"x": iter([RANGE]), "batch_size": 1},
        "`x` must be arrays with samples along their first axis, a tf.data.Dataset or a "
        "keras.utils.PyDataset. Received: x of type list_iterator and shape ().",
    ),
    (
        {"x": RANGE, "y": [0, 1], "batch_size": 1},
        "`y` must be arrays with samples along their first axis. Received: y of type int and shape ().",
    ),
    (
        {"x": RANGE, "batch_size": 1, "shuffle_buffer": 8},
        "`shuffle_buffer` must be None where `x` is arrays. Received: shuffle_buffer=8.",
    ),
    (
        {"x": dataset(12), "shuffle_buffer": 0},
        "`shuffle_buffer` must be an integer of at least 1. Received: shuffle_buffer=0.",
    ),
    (
        {"x": dataset(12), "y": RANGE},
        "`y` must be None where `x` is a tf.data.Dataset. Received: y=a ndarray.",
    ),
    (
        {"x": Batches(), "sample_weight": RANGE},
        "`sample_weight` must be None where `x` is a PyDataset. Received: sample_weight=a ndarray.",
    ),
    (
        {"x": Batches(), "batch_size": 2},
        "`batch_size` must be None where `x` is a PyDataset. Received: batch_size=2.",
    ),
    (
        {"x": Batches(), "shuffle_buffer": 2},
        "`shuffle_buffer` must be None where `x` is a PyDataset. Received: shuffle_buffer=2.",
    ),
    (
        {"x": Batches(), "uneven": "keep"},
        "`uneven` must be 'drop' or 'repeat' for a PyDataset, whose batches are dealt whole. "
        "Received: uneven='keep'.",
    ),
    (
        {"x": Endless(), "mode": "slice"},
        "`mode` must be 'scatter' for an infinite PyDataset, which has no contiguous blocks. "
        "Received: mode='slice'.",
    ),
    (
        {"x": dataset(12), "uneven": "keep"},
        "`batch_size` must be given with uneven='keep', which makes a smaller last batch. "
        "Received: batch_size=None.",
    ),
    (
        {"x": uncounted(), "mode": "slice"},
        "`mode` must be 'scatter' for a tf.data.Dataset of unknown cardinality, which has no "
        "contiguous blocks. Received: mode='slice'.",
    ),
    (
        {"x": uncounted(), "uneven": "repeat"},
        "`uneven` must be 'drop' for a tf.data.Dataset of unknown cardinality "
        "(tf.data.experimental.assert_cardinality makes it known). Received: uneven='repeat'.",
    ),
    (
        {"x": dataset(12).repeat(), "mode": "slice"},
        "`mode` must be 'scatter' for a tf.data.Dataset of infinite cardinality, which has no "
        "contiguous blocks. Received: mode='slice'.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_all_ranks_raise_the_same_error(arguments, message):
    for rank in range(4):
        with pytest.raises(ValueError) as caught:
            data.shard(**arguments, rank=rank, size=4)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        (
            1,
            None,
            "`rank` and `size` must be given together, or neither. Received: rank=1, size=None.",
        ),
        (
            None,
            2,
            "`rank` and `size` must be given together, or neither. Received: rank=None, size=2.",
        ),
        (2, 2, "`rank` must be below `size`. Received: rank=2, size=2."),
        (-1, 2, "`rank` must be an integer of at least 0. Received: rank=-1."),
        (0, 0, "`size` must be an integer of at least 1. Received: size=0."),
        (0, "2", "`size` must be an integer of at least 1. Received: size='2'."),
    ],
)
def test_rank_and_size(rank, size, message):
    with pytest.raises(ValueError) as caught:
        data.shard(RANGE, batch_size=2, rank=rank, size=size)
    assert str(caught.value) == message


@pytest.mark.parametrize("epoch", [-1, 1.5])
@pytest.mark.parametrize("x", [RANGE, Batches()], ids=["arrays", "PyDataset"])
def test_set_epoch(x, epoch):
    sharded = data.shard(x, batch_size=2 if x is RANGE else None, rank=0, size=2)
    with pytest.raises(ValueError) as caught:
        sharded.set_epoch(epoch)
    assert str(caught.value) == f"`epoch` must be an integer of at least 0. Received: epoch={epoch}."
