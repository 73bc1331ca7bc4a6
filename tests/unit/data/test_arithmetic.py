"""Cluster-wide batch arithmetic, against values worked out by hand."""

import numpy as np
import pytest

from hvdext import data


@pytest.mark.parametrize(
    ("per_rank", "size", "passes", "expected"), [(32, 1, 1, 32), (32, 4, 1, 128), (8, 3, 5, 120)]
)
def test_global_batch_and_back(per_rank, size, passes, expected):
    assert data.global_batch_size(per_rank, size, passes) == expected
    assert data.per_rank_batch_size(expected, size, passes) == per_rank


def test_one_backward_pass_is_the_default():
    assert data.global_batch_size(32, 4) == 128
    assert data.per_rank_batch_size(128, 4) == 32
    assert data.scale_learning_rate(0.1, 4) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("size", "passes", "rule", "expected"),
    [
        (8, 1, "linear", 0.8),
        (8, 2, "linear", 1.6),
        (4, 1, "sqrt", 0.2),
        (3, 3, "sqrt", 0.3),
        (1, 1, "sqrt", 0.1),
    ],
)
def test_learning_rate_rules(size, passes, rule, expected):
    assert data.scale_learning_rate(0.1, size, passes, rule) == pytest.approx(expected)


def test_batch_weights_by_hand():
    # 3 ranks, 6 samples: weights n * 3 / 6.
    np.testing.assert_allclose(data.batch_weights([1, 2, 3]), [0.5, 1.0, 1.5])
    np.testing.assert_allclose(data.batch_weights((4, 4)), [1.0, 1.0])


def test_weighted_average_of_means_is_the_mean_of_all():
    losses = [np.array([1.0, 5.0, 9.0]), np.array([2.0]), np.array([4.0, 8.0])]
    weights = data.batch_weights([len(part) for part in losses])
    average = np.mean([w * part.mean() for w, part in zip(weights, losses, strict=True)])
    assert average == pytest.approx(29 / 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: data.global_batch_size(0, 2),
            "`per_rank` must be an integer of at least 1. Received: per_rank=0.",
        ),
        (
            lambda: data.global_batch_size(32, 2.0),
            "`size` must be an integer of at least 1. Received: size=2.0.",
        ),
        (
            lambda: data.global_batch_size(32, 2, 0),
            "`backward_passes_per_step` must be an integer of at least 1. "
            "Received: backward_passes_per_step=0.",
        ),
        (
            lambda: data.per_rank_batch_size(100, 3, 2),
            "`global_batch` must divide by size * backward_passes_per_step = 6. "
            "Received: global_batch=100, size=3, backward_passes_per_step=2.",
        ),
        (
            lambda: data.per_rank_batch_size(True, 1),
            "`global_batch` must be an integer of at least 1. Received: global_batch=True.",
        ),
        (
            lambda: data.scale_learning_rate(0.0, 2),
            "`base` must be a number above 0. Received: base=0.0.",
        ),
        (
            lambda: data.scale_learning_rate("0.1", 2),
            "`base` must be a number above 0. Received: base='0.1'.",
        ),
        (
            lambda: data.scale_learning_rate(0.1, 2, rule="cubic"),
            "`rule` must be one of 'linear', 'sqrt'. Received: rule='cubic'.",
        ),
        (
            lambda: data.batch_weights([]),
            "`batch_sizes` must not be empty. Received: batch_sizes=[].",
        ),
        (
            lambda: data.batch_weights([2, 0]),
            "`batch_sizes` must be an integer of at least 1. Received: batch_sizes=0.",
        ),
    ],
)
def test_errors_name_argument_rule_and_value(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message
