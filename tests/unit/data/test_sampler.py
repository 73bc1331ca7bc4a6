"""Who gets which sample, against values worked out by hand."""

import numpy as np
import pytest

from hvdext import data


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("scatter", [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
        ("slice", [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]),
    ],
)
def test_samples_of_rank_by_hand(mode, expected):
    assert [data.samples_of_rank(10, rank, 4, mode).tolist() for rank in range(4)] == expected


@pytest.mark.parametrize("mode", ["scatter", "slice"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_samples", [0, 1, 6, 7, 29])
def test_samples_of_all_ranks_are_all_samples(mode, size, num_samples):
    parts = [data.samples_of_rank(num_samples, rank, size, mode) for rank in range(size)]
    assert sorted(np.concatenate(parts)) == list(range(num_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "size", "drop", "repeat", "keep"),
    [
        (24, 2, 3, 4, 4, 4),  # divides
        (26, 2, 3, 4, 5, 4),  # 2 of 6 remain: too few for a step of 3 ranks
        (27, 2, 3, 4, 5, 5),  # 3 of 6 remain: one each
        (1797, 32, 4, 14, 15, 15),  # 14 * 128 = 1792, 5 remain
        (7, 7, 1, 1, 1, 1),
        (8, 7, 1, 1, 2, 2),
    ],
)
def test_steps_per_epoch(num_samples, batch_size, size, drop, repeat, keep):
    steps = [
        data.steps_per_epoch(num_samples, batch_size, size, uneven) for uneven in ("drop", "repeat", "keep")
    ]
    assert steps == [drop, repeat, keep]


@pytest.mark.parametrize(
    ("num_samples", "uneven", "expected"),
    [
        (24, "keep", (2, 2, 2)),
        (26, "keep", (3, 3, 2)),  # 8, 9 and 9 samples in 4 steps of 2
        (28, "keep", (2, 1, 1)),  # 4 remain for a fifth step
        (28, "drop", (2, 2, 2)),
        (28, "repeat", (2, 2, 2)),
    ],
)
def test_last_batch_sizes(num_samples, uneven, expected):
    assert data.last_batch_sizes(num_samples, 2, 3, uneven) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: data.samples_of_rank(-1, 0, 2),
            "`num_samples` must be an integer of at least 0. Received: num_samples=-1.",
        ),
        (
            lambda: data.samples_of_rank(8, 2, 2),
            "`rank` must be below `size`. Received: rank=2, size=2.",
        ),
        (
            lambda: data.samples_of_rank(8, 0, 2, "foo"),
            "`mode` must be one of 'scatter', 'slice'. Received: mode='foo'.",
        ),
        (
            lambda: data.steps_per_epoch(8, 0, 2),
            "`batch_size` must be an integer of at least 1. Received: batch_size=0.",
        ),
        (
            lambda: data.steps_per_epoch(8, 2, 0),
            "`size` must be an integer of at least 1. Received: size=0.",
        ),
        (
            lambda: data.steps_per_epoch(8, 2, 2, "pad"),
            "`uneven` must be one of 'drop', 'repeat', 'keep'. Received: uneven='pad'.",
        ),
        (
            lambda: data.steps_per_epoch(3, 1, 4),
            "`num_samples` must hold at least as many samples as there are ranks. "
            "Received: 3 samples for size=4.",
        ),
        (
            lambda: data.last_batch_sizes(7, 4, 2, "drop"),
            "`batch_size` must be at most 7 samples // 2 ranks = 3 with uneven='drop', which uses "
            "full batches only (uneven='repeat' fills them, uneven='keep' makes a smaller one). "
            "Received: batch_size=4.",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message
