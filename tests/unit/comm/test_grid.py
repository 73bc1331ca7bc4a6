"""`hvd.Grid`: who meets whom along each axis, and what works over the data axis."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import current, use
from hvdext.comm.grid import Axes, groups, place_of
from hvdext.testing import run_ranks


def test_ranks_are_numbered_slices_fastest():
    shape = Axes(data=2, pipeline=3, slices=2)
    assert groups(shape, 2) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert groups(shape, 1) == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert groups(shape, 0) == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]
    assert place_of(9, shape) == Axes(data=1, pipeline=1, slices=1)
    assert place_of(4, shape) == Axes(data=0, pipeline=2, slices=0)


def test_communicators_along_the_axes():
    def one_rank(comm):
        grid = hvd.Grid(data=2, pipeline=2, slices=2)
        sums = [
            axis.allreduce([tf.constant(2.0**comm.rank)], "hvdext.demo")[0].numpy().item()
            for axis in (grid.data, grid.pipeline, grid.slices)
        ]
        return sums, tuple(grid.place), [grid.data.rank, grid.pipeline.rank, grid.slices.rank]

    for rank, (sums, place, ranks) in enumerate(run_ranks(8, one_rank)):
        assert sums == [2.0**rank + 2.0 ** (rank ^ bit) for bit in (4, 2, 1)]
        assert list(place) == ranks == [rank >> 2, rank >> 1 & 1, rank & 1]


def test_data_takes_what_the_others_leave():
    def one_rank(comm):
        grid = hvd.Grid(slices=2)
        return repr(grid), grid.data_set.ranks, grid.pipeline.ranks

    found = run_ranks(4, one_rank)
    assert found[1] == ("Grid(data=2, pipeline=1, slices=2)", (1, 3), (1,))
    with use(SoloComm()):
        assert repr(hvd.Grid()) == "Grid(data=1, pipeline=1, slices=1)"


@pytest.mark.parametrize(
    "lengths",
    [
        {"data": 2, "pipeline": 2, "slices": 1},
        {"slices": 3},
        {"data": 0, "slices": 2},
        {"data": 2, "slices": True},
        {"data": 1, "pipeline": 2.0},
    ],
)
def test_what_is_no_grid_of_two_ranks(lengths):
    received = ", ".join(
        f"{axis}={n}" for axis, n in ({"data": None, "pipeline": 1, "slices": 1} | lengths).items()
    )
    with pytest.raises(
        ValueError, match=f"whose product is the number of ranks. Received: {received} on 2 ranks"
    ):
        run_ranks(2, lambda comm: hvd.Grid(**lengths))


def test_ranks_that_name_different_grids():
    with pytest.raises(ValueError, match=r"The ranks disagree about hvd\.Grid"):
        run_ranks(2, lambda comm: hvd.Grid(data=comm.rank + 1, slices=2 - comm.rank))


def test_the_data_axis_is_the_world():
    def one_rank(comm):
        grid = hvd.Grid(data=2, slices=2)
        variable = keras.Variable([float(comm.rank)], name="v")
        with grid.data_parallel():
            ranks = [hvd.rank(), hvd.size(), hvd.verbose()]
            data = hvd.data.shard(np.arange(8), batch_size=2, shuffle=False)
            mine = np.concatenate([x for (x,) in data.as_numpy_iterator()]).tolist()
            hvd.broadcast_variables([variable], root_rank=1)
            optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
            optimizer.apply([tf.constant([10.0**comm.rank])], [variable])
        assert current() is comm
        same = hvd.data.shard(
            np.arange(8), batch_size=2, shuffle=False, rank=grid.data.rank, size=grid.data.size
        )
        assert np.concatenate([x for (x,) in same.as_numpy_iterator()]).tolist() == mine
        return ranks, mine, variable.numpy().item()

    found = run_ranks(4, one_rank)
    # Ranks 0 and 2 hold slice 0, so the root is 2; ranks 1 and 3 hold slice 1.
    means = [(1 + 100) / 2, (10 + 1000) / 2]
    for rank, (ranks, mine, value) in enumerate(found):
        assert ranks == [rank // 2, 2, int(rank == 0)]
        assert mine == list(range(rank // 2, 8, 2))
        assert value == 2 + rank % 2 - means[rank % 2]


def test_data_shared_by_load_is_for_the_data_axis_alone():
    def run(comm):
        with hvd.Grid(data=1, slices=2).data_parallel():
            hvd.data.shared_by_load(np.arange(8), batch_size=2)

    with pytest.raises(ValueError, match=r"a call within Grid\(data=1, pipeline=1, slices=2\)"):
        run_ranks(2, run)


def test_a_process_set_does_the_same():
    def one_rank(comm):
        grid = hvd.Grid(data=2, pipeline=2)
        variable = keras.Variable(0.0, name=f"stage{grid.place.pipeline}")
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), process_set=grid.data_set)
        optimizer.apply([tf.constant(10.0**comm.rank)], [variable])
        return variable.numpy().item()

    assert run_ranks(4, one_rank) == [-50.5, -505.0, -50.5, -505.0]


@pytest.mark.slow
def test_local_sgd_over_the_data_axis():
    def one_rank(comm):
        grid = hvd.Grid(data=2, slices=2)
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, name="only")])
        model.set_weights([np.full((1, 1), 10.0**comm.rank)])
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
        with grid.data_parallel():
            sync = hvd.sync.LocalSGD(every=1)
            model.fit(np.ones((2, 1)), np.ones((2, 1)), callbacks=[sync], verbose=0)
        return model.get_weights()[0].item()

    assert run_ranks(4, one_rank) == pytest.approx([50.5, 505.0, 50.5, 505.0])


def test_numpy_s_integers_are_as_good_as_python_s():
    """Also where another rank was given Python's."""

    def run(comm):
        grid = hvd.Grid(data=[np.int64, int][comm.rank](2), slices=np.int32(1))
        ranks = hvd.ProcessSet(np.arange(2)).ranks
        return [type(length) for length in (*grid.shape, *ranks)], tuple(grid.shape), ranks

    assert run_ranks(2, run) == [([int] * 5, (2, 1, 1), (0, 1))] * 2
