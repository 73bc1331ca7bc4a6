"""Ranks deal from one order of the same samples, or all of them get an error that says what to write."""

import numpy as np
import pytest
import tensorflow as tf

from hvdext import data
from hvdext.comm.current import current
from hvdext.keras_tools.dataset_order import order_of
from hvdext.testing import run_ranks

RANGE = tf.data.Dataset.range
CURE = r"same samples in the same order on every rank.*hvd.data.shard\(..., seed=0\)"


def _refused(run, match, size=2):
    told = []

    def one(comm):
        try:
            run(comm)
        except ValueError as error:
            told.append(str(error))

    run_ranks(size, one)
    assert len(told) == size
    assert len(set(told)) == 1
    with pytest.raises(ValueError, match=match):
        raise ValueError(told[0])


UNDECIDED = {
    "shuffle": (lambda: RANGE(9).shuffle(9), r"shuffle\(..., seed=0\)"),
    "below a map": (lambda: RANGE(9).shuffle(9).map(lambda i: i + 1), r"shuffle\(..., seed=0\)"),
    "cached": (lambda: RANGE(9).shuffle(9).cache(), r"shuffle\(..., seed=0\)"),
    "within interleave": (lambda: RANGE(3).interleave(lambda i: RANGE(i, 5).shuffle(3)), "shuffle"),
    "files": (lambda: tf.data.Dataset.list_files(__file__), r"list_files\(..., seed=0\)"),
    "sampled": (lambda: tf.data.Dataset.sample_from_datasets([RANGE(3), RANGE(3)]), "sample_from_datasets"),
    "random": (lambda: tf.data.Dataset.random(), "Dataset.random"),
    "filter": (lambda: RANGE(9).filter(lambda i: tf.random.uniform([]) < 0.5), r"filter\(\) by random"),
    "who is first": (
        lambda: RANGE(3).interleave(lambda i: RANGE(i, 5), num_parallel_calls=2, deterministic=False),
        "deterministic=True",
    ),
    "who is mapped first": (
        lambda: RANGE(3).map(lambda i: i, num_parallel_calls=2, deterministic=False),
        "deterministic=True",
    ),
}


@pytest.mark.parametrize("kind", UNDECIDED)
def test_an_order_of_each_process_s_own(kind):
    make, right = UNDECIDED[kind]
    made = make()
    with pytest.raises(ValueError, match=f"{CURE}.*Received: .*{right}"):
        data.shard(made, rank=0, size=2)
    data.shard(made, rank=0, size=1)  # one process may draw as it likes


@pytest.mark.parametrize(
    "make",
    [
        lambda: RANGE(9).shuffle(9, seed=1),
        lambda: RANGE(3).interleave(lambda i: RANGE(i, 5).shuffle(3, seed=2)),
        lambda: RANGE(3).interleave(lambda i: RANGE(i, 5), num_parallel_calls=2),
        lambda: RANGE(9).filter(lambda i: i < 5),
        lambda: RANGE(9).map(lambda i: tf.random.uniform([])),  # of a sample, not of their order
        lambda: tf.data.Dataset.list_files(__file__, shuffle=False),
    ],
    ids=["seed", "seed within", "parallel", "filter", "augmented", "files in order"],
)
def test_an_order_that_all_have(make):
    assert order_of(make()).undecided == []


def test_every_sample_once_with_a_seed():
    def run(comm):
        made = data.shard(RANGE(100).shuffle(100, seed=1), batch_size=10)
        return np.concatenate([batch.numpy() for batch in made])

    assert sorted(np.concatenate(run_ranks(2, run))) == list(range(100))


ORDERS = {
    "seeds": lambda r: {"x": RANGE(20).shuffle(20, seed=r)},
    "slices": lambda r: {"x": tf.data.Dataset.from_tensor_slices(np.random.default_rng(r).permutation(20))},
    "files": lambda r: {"x": tf.data.TFRecordDataset(["a", "b"][:: 1 - 2 * r])},
    "arrays": lambda r: {
        "x": np.random.default_rng(r).permutation(20),
        "y": np.arange(20),
        "batch_size": 2,
    },
    "words": lambda r: {"x": np.array(["a", "b", "c", "d"][:: 1 - 2 * r]), "batch_size": 2},
    "targets": lambda r: {"x": {"a": np.ones(20)}, "y": np.roll(np.arange(20), r), "batch_size": 2},
}


@pytest.mark.parametrize("kind", ORDERS)
def test_orders_that_differ(kind):
    _refused(lambda comm: data.shard(**ORDERS[kind](comm.rank)), f"{CURE}.*rank 0: .*rank 1: ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (lambda r: {"seed": r}, "seed: rank 0: 0; rank 1: 1"),
        (lambda r: {"batch_size": 2 + r}, "batch_size: rank 0: 2; rank 1: 3"),
        (lambda r: {"x": np.zeros((20 + r, 1))}, r"arrays: .*\(20, 1\).*\(21, 1\)"),
        (lambda r: {"x": np.zeros(20, ["float32", "float64"][r])}, "float32.*float64"),
        (lambda r: {"uneven": ["drop", "dorp"][r]}, "error: .*rank 1: .*Did you mean 'drop'"),
    ],
)
def test_arguments_that_differ(options, told):
    def run(comm):
        data.shard(**({"x": np.zeros((20, 1)), "batch_size": 2} | options(comm.rank)))

    _refused(run, f"(?s)disagree about hvd.data.shard.*{told}")


def test_rounding_is_no_other_order():
    """Hosts of different kinds normalise the same images to different last bits."""

    def run(comm):
        x = np.linspace(0, 1, 40) * (1 + 1e-7 * comm.rank)
        return np.concatenate([batch[0].numpy() for batch in data.shard(x, batch_size=5)])

    assert len(np.concatenate(run_ranks(2, run))) == 40


def test_nobody_talks_where_rank_and_size_are_given():
    def run(comm):
        data.shard(np.arange(8) + comm.rank, batch_size=2, rank=comm.rank, size=2)
        return current().traffic()

    assert all("data" not in key for traffic in run_ranks(2, run) for key in traffic)
