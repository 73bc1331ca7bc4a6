"""`ProcessSet` and the global one; registration with an engine is tested under horovodrun."""

import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.current import current
from hvdext.testing import run_ranks


def test_places_within_a_set():
    def one_rank(comm):
        even = hvd.ProcessSet([2, 0])
        place = even.rank() if even.included() else None
        return even.ranks, even.size(), even.included(), place, even.process_set_id

    assert run_ranks(3, one_rank) == [
        ((0, 2), 2, True, 0, None),
        ((0, 2), 2, False, None, None),
        ((0, 2), 2, True, 1, None),
    ]


def test_the_global_set_is_all_ranks_of_the_job():
    def one_rank(comm):
        everyone = hvd.global_process_set
        return everyone.ranks, everyone.size(), everyone.rank(), everyone.included(), everyone.process_set_id

    for size in (3, 2):
        expected = [(tuple(range(size)), size, rank, True, 0) for rank in range(size)]
        assert run_ranks(size, one_rank) == expected


def test_a_set_of_all_ranks_has_the_global_number():
    assert run_ranks(2, lambda comm: hvd.ProcessSet([1, 0]).process_set_id) == [0, 0]
    assert hvd.ProcessSet([0, 1]).process_set_id is None  # before init
    assert hvd.ProcessSet([0, 1]).mpi_comm is None


def test_the_global_set_does_wherever_a_set_is_accepted():
    def one_rank(comm):
        everyone = hvd.global_process_set
        variable = keras.Variable(1.0, name="v")
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), process_set=everyone)
        optimizer.apply([tf.constant(comm.rank + 1.0)], [variable])  # 1 - 1.5
        source = tf.Variable(1.0, name="source")
        with hvd.DistributedGradientTape(tf.GradientTape(), process_set=everyone) as tape:
            loss = source * (comm.rank + 1.0)
        gradient = tape.gradient(loss, [source])[0].numpy()
        copied = keras.Variable(comm.rank + 5.0)
        hvd.broadcast_variables([copied], root_rank=1, process_set=everyone, inplace=True)
        total = (
            current().subset(everyone.ranks).allreduce([tf.constant(comm.rank + 1)], "hvdext.demo")[0].numpy()
        )
        return [variable.numpy(), gradient, copied.numpy(), total]

    np.testing.assert_allclose(run_ranks(2, one_rank), [[-0.5, 1.5, 6, 3]] * 2)


def test_without_init():
    for ask in (hvd.global_process_set.size, hvd.global_process_set.rank, hvd.ProcessSet([0]).included):
        with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
            ask()
    assert repr(hvd.global_process_set) == "hvd.global_process_set"
    assert repr(hvd.ProcessSet((1, 0))) == "ProcessSet([0, 1])"


@pytest.mark.parametrize("wrong", [[], [0, 0], [-1], [0.5], [True], "01", 3, None])
def test_what_is_not_a_set(wrong):
    with pytest.raises(
        ValueError, match=r"`ranks_or_comm` must be distinct, non-negative integers.*Received"
    ):
        hvd.ProcessSet(wrong)


def test_unknown_keyword():
    with pytest.raises(TypeError, match=r"`hvd.ProcessSet` has no argument `ranks`. It has: ranks_or_comm."):
        hvd.ProcessSet(ranks=[0])


def test_mpi_communicators(monkeypatch):
    """A stand-in for mpi4py: what counts is which question goes to the engine, and the error without MPI."""

    class Comm:
        pass

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", types.SimpleNamespace(Comm=Comm))
    monkeypatch.setattr("hvdext.comm.process_sets.mpi_built", lambda: False)
    with pytest.raises(ValueError, match=r"`ranks_or_comm` must hold ranks.*built without MPI"):
        hvd.ProcessSet(Comm())
    monkeypatch.setattr("hvdext.comm.process_sets.mpi_built", lambda: True)
    comm = Comm()
    made = hvd.ProcessSet(comm)
    assert made.mpi_comm is comm
    assert made.process_set_id is None
    with pytest.raises(RuntimeError, match="known once it is registered"):
        made.size()
    made.learn_ranks([3, 1])
    assert made.ranks == (1, 3)


def test_adding_and_removing_without_an_engine():
    def one_rank(comm):
        added = hvd.add_process_set([0, 1])
        results = [added.ranks, hvd.remove_process_set(added), hvd.remove_process_set(hvd.global_process_set)]
        return [*results, hvd.remove_process_set(hvd.ProcessSet([0]))]

    assert run_ranks(2, one_rank) == [[(0, 1), False, False, False]] * 2
    with pytest.raises(TypeError, match=r"`process_set` must be a hvd.ProcessSet. Received: .*\[0\]"):
        run_ranks(2, lambda comm: hvd.remove_process_set([0]))
    with pytest.raises(ValueError, match="The ranks disagree about remove_process_set"):
        run_ranks(2, lambda comm: hvd.remove_process_set(hvd.ProcessSet([comm.rank])))
