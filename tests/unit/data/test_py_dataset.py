"""Sharding a keras.utils.PyDataset: whole batches are dealt."""

import itertools
import logging
import pickle

import keras
import numpy as np
import pytest

from hvdext import data


class Batches(keras.utils.PyDataset):
    """Batch k holds the number k."""

    def __init__(self, count, **kwargs):
        super().__init__(**kwargs)
        self.count = count
        self.calls = []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return np.full((2, 1), index, "float32"), np.zeros((2, 1), "float32")

    def on_epoch_begin(self):
        self.calls.append("begin")

    def on_epoch_end(self):
        self.calls.append("end")


class Endless(Batches):
    @property
    def num_batches(self):
        return None


def listed(sharded):
    return [int(x[0, 0]) for x, _ in sharded]


def run_epoch(sharded):
    sharded.on_epoch_begin()
    batches = listed(sharded)
    sharded.on_epoch_end()
    return batches


@pytest.mark.parametrize(
    ("mode", "uneven", "expected"),
    [
        ("scatter", "drop", [[0, 3], [1, 4], [2, 5]]),
        ("slice", "drop", [[0, 1], [2, 3], [4, 5]]),
        ("scatter", "repeat", [[0, 3, 6], [1, 4, 7], [2, 5, 0]]),
        ("slice", "repeat", [[0, 1, 2], [3, 4, 5], [6, 7, 0]]),
    ],
)
def test_batches_by_hand(mode, uneven, expected):
    for rank, batches in enumerate(expected):
        sharded = data.shard(Batches(8), mode=mode, uneven=uneven, shuffle=False, rank=rank, size=3)
        assert [run_epoch(sharded) for _ in range(2)] == [batches, batches]
        assert len(sharded) == sharded.num_batches == len(batches)
        assert sharded.total_batches == 8
        assert (sharded.dropped, sharded.repeated) == ((2, 0) if uneven == "drop" else (0, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["scatter", "slice"])
@pytest.mark.parametrize("uneven", ["drop", "repeat"])
def test_every_epoch_deals_each_batch_as_promised(size, mode, uneven):
    ranks = [
        data.shard(Batches(11), mode=mode, uneven=uneven, seed=2, rank=rank, size=size)
        for rank in range(size)
    ]
    epochs = [[run_epoch(sharded) for sharded in ranks] for _ in range(3)]
    for parts in epochs:
        taken = [batch for part in parts for batch in part]
        assert len({len(part) for part in parts}) == 1
        assert len(taken) == 11 - ranks[0].dropped + ranks[0].repeated
        assert len(set(taken)) == min(len(taken), 11)
    assert len({tuple(parts[0]) for parts in epochs}) == 3


def test_steps_are_those_of_one_process():
    together = [run_epoch(data.shard(Batches(12), rank=rank, size=3)) for rank in range(3)]
    alone = run_epoch(data.shard(Batches(12), rank=0, size=1))
    assert [list(step) for step in zip(*together, strict=True)] == [
        alone[0:3],
        alone[3:6],
        alone[6:9],
        alone[9:12],
    ]


def test_epoch_advances_only_after_an_epoch():
    sharded = data.shard(Batches(12), rank=0, size=2)
    sharded.on_epoch_end()  # Keras does so before the first epoch
    assert sharded.epoch == 0
    first = run_epoch(sharded)
    assert sharded.epoch == 1
    assert run_epoch(sharded) != first
    sharded.set_epoch(0)
    assert run_epoch(sharded) == first


def test_settings_are_kept_and_ends_of_epochs_forwarded():
    source = Batches(4, workers=3, use_multiprocessing=True, max_queue_size=5)
    sharded = data.shard(source, rank=0, size=2)
    assert (sharded.workers, sharded.use_multiprocessing, sharded.max_queue_size) == (3, True, 5)
    run_epoch(sharded)
    assert source.calls == ["begin", "end"]


def test_worker_processes_get_the_current_order():
    sharded = data.shard(Batches(12), rank=1, size=2)
    sharded.set_epoch(4)
    copy = pickle.loads(pickle.dumps(sharded))
    assert listed(copy) == listed(sharded)


def test_index_out_of_range():
    with pytest.raises(IndexError):
        data.shard(Batches(4), rank=0, size=2)[2]


def test_infinite_source():
    source = Endless(0, workers=2)
    sharded = data.shard(source, rank=1, size=3)
    assert sharded.num_batches is None
    assert sharded.workers == 2
    assert listed(itertools.islice(iter(sharded), 3)) == [1, 4, 7]
    assert sharded.dropped == sharded.repeated == 0
    sharded.on_epoch_begin()
    sharded.on_epoch_end()
    assert source.calls == ["begin", "end"]


def test_rank_0_reports_once(caplog):
    with caplog.at_level(logging.WARNING, "hvdext.data"):
        for rank in range(3):
            data.shard(Batches(11), rank=rank, size=3)
    assert caplog.messages == [
        "2 of 11 batches are left out of every epoch (others each time), so that 3 ranks take 3 "
        "steps each (uneven='drop', batch_size=1)."
    ]
