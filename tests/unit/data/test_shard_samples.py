"""Sharding samples: arrays, and tf.data.Datasets of samples, keep the same promises."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext import data
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.testing import run_ranks

ALL_SIZES = pytest.mark.parametrize("size", [1, 2, 3, 4])
ALL_MODES = pytest.mark.parametrize("mode", ["scatter", "slice"])
ALL_UNEVEN = pytest.mark.parametrize("uneven", ["drop", "repeat", "keep"])


def flat(batches):
    return [sample for batch in batches for sample in batch]


@pytest.mark.parametrize(
    ("num_samples", "mode", "uneven", "expected"),
    [
        (10, "scatter", "drop", [[[0, 3]], [[1, 4]], [[2, 5]]]),
        (10, "slice", "drop", [[[0, 1]], [[2, 3]], [[4, 5]]]),
        (10, "scatter", "repeat", [[[0, 3], [6, 9]], [[1, 4], [7, 0]], [[2, 5], [8, 1]]]),
        (10, "slice", "repeat", [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 1]]]),
        (10, "scatter", "keep", [[[0, 3], [6, 9]], [[1, 4], [7]], [[2, 5], [8]]]),
        (10, "slice", "keep", [[[0, 1], [2, 3]], [[4, 5], [6]], [[7, 8], [9]]]),
        # 2 of 8 samples remain, which 3 ranks cannot share as one more step.
        (8, "scatter", "keep", [[[0, 3, 6]], [[1, 4, 7]], [[2, 5]]]),
        (8, "slice", "keep", [[[0, 1, 2]], [[3, 4, 5]], [[6, 7]]]),
        # Fewer samples than one step of all ranks takes: they go around more than once.
        (3, "scatter", "repeat", [[[0, 0]], [[1, 1]], [[2, 2]]]),
    ],
)
def test_batches_by_hand(shard_range, epochs_of, num_samples, mode, uneven, expected):
    for rank, batches in enumerate(expected):
        sharded = shard_range(
            num_samples,
            batch_size=2,
            mode=mode,
            uneven=uneven,
            shuffle=False,
            rank=rank,
            size=3,
        )
        assert epochs_of(sharded, 2) == [batches, batches]
        assert len(sharded) == len(batches)
        assert sharded.num_samples == len(flat(batches))
        assert sharded.total_samples == num_samples


@ALL_SIZES
@ALL_MODES
@ALL_UNEVEN
@pytest.mark.slow
def test_every_epoch_deals_each_sample_as_promised(shard_range, epochs_of, size, mode, uneven):
    total = 29
    ranks = [
        shard_range(total, batch_size=2, mode=mode, uneven=uneven, seed=3, rank=rank, size=size)
        for rank in range(size)
    ]
    batches = [epochs_of(sharded, 2) for sharded in ranks]
    steps = {len(epoch) for rank in batches for epoch in rank}
    assert steps == {len(ranks[0])}
    assert len({data_set.dropped for data_set in ranks}) == 1

    dropped = {"drop": total % (2 * size), "repeat": 0, "keep": 0}[uneven]
    repeated = {"drop": 0, "repeat": -total % (2 * size), "keep": 0}[uneven]
    assert (ranks[0].dropped, ranks[0].repeated) == (dropped, repeated)
    for epoch in range(2):
        taken = flat(flat(rank[epoch] for rank in batches))
        assert len(taken) == total - dropped + repeated
        assert len(set(taken)) == min(len(taken), total)  # nothing twice beyond `repeated`
        if uneven != "keep":
            assert {len(batch) for rank in batches for batch in rank[epoch]} == {2}
    assert flat(batches[0][0]) != flat(batches[0][1])  # reshuffled


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("uneven", "num_samples"),
    [("drop", 29), ("repeat", 29), ("keep", 24), ("keep", 25), ("keep", 29)],
)
def test_ranks_steps_are_one_process_steps(shard_range, epochs_of, size, uneven, num_samples):
    def epoch(batch_size, rank, size):
        sharded = shard_range(num_samples, batch_size=batch_size, uneven=uneven, seed=5, rank=rank, size=size)
        return epochs_of(sharded, 1)[0]

    together = [epoch(2, rank, size) for rank in range(size)]
    union = [sorted(flat(step)) for step in zip(*together, strict=True)]
    alone = [sorted(batch) for batch in epoch(2 * size, 0, 1)]
    if uneven == "keep":  # the last step may hold what one process spreads over two
        last = len(union) - 1
        alone[last:] = [sorted(flat(alone[last:]))]
    assert union == alone


def test_seed_and_epoch_decide_the_order(shard_range, epochs_of):
    def epochs(seed, first=0):
        sharded = shard_range(32, batch_size=4, seed=seed, rank=0, size=2)
        sharded.set_epoch(first)
        return epochs_of(sharded, 2)

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)
    assert epochs(1, first=1)[0] == epochs(1)[1]


def test_epoch_counts_passes(shard_range, epochs_of):
    sharded = shard_range(32, batch_size=4, rank=0, size=2)
    assert sharded.epoch == 0
    epochs_of(sharded, 2)
    assert sharded.epoch == 2
    iter(sharded)  # nothing is drawn from it
    assert sharded.epoch == 2
    sharded.set_epoch(7)
    assert sharded.epoch == 7


def test_global_seed_of_tensorflow_has_no_say(shard_range, epochs_of):
    """Scripts often call `tf.random.set_seed(seed + rank)`."""
    try:
        orders = []
        for rank in (0, 1):
            tf.random.set_seed(100 + rank)
            sharded = shard_range(32, batch_size=4, rank=0, size=2)
            orders.append(epochs_of(sharded, 2))
    finally:
        keras.utils.set_random_seed(0)
    assert orders[0] == orders[1]


def test_rank_and_size_come_from_the_communicator(shard_range, epochs_of):
    def batches(comm):
        return epochs_of(shard_range(6, batch_size=1, shuffle=False), 1)[0]

    assert run_ranks(3, batches) == [[[0], [3]], [[1], [4]], [[2], [5]]]
    with use(SoloComm()):
        assert batches(None) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize(
    ("uneven", "expected"),
    [
        ("drop", "5 of 29 {unit} are left out of every epoch (others each time), so that 4 ranks"),
        ("repeat", "3 of 29 {unit} are taken twice in every epoch (others each time), so that 4"),
        ("keep", None),
    ],
)
def test_rank_0_reports_once(shard_range, caplog, request, uneven, expected):
    unit = "samples" if "arrays" in request.node.callspec.id else "elements"
    with caplog.at_level(logging.WARNING, "hvdext.data"):
        for rank in (0, 3):
            shard_range(29, batch_size=2, uneven=uneven, rank=rank, size=4)
    if expected is None:
        assert caplog.messages == []
    else:
        (message,) = caplog.messages
        assert message.startswith(expected.format(unit=unit))


def test_report_says_that_it_is_always_the_same_ones(caplog):
    with caplog.at_level(logging.WARNING, "hvdext.data"):
        data.shard(np.arange(29), batch_size=2, shuffle=False, rank=0, size=4)
    assert caplog.messages == [
        "5 of 29 samples are left out of every epoch (the same ones each time), so that 4 ranks "
        "take 3 steps each (uneven='drop', batch_size=2)."
    ]
