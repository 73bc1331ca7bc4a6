"""`hvd.init` and what hangs on it, without an engine; with one: runtime_programs."""

import json
import sys
import types

import keras
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.current import process_comm
from hvdext.launch import arguments
from hvdext.testing import run_ranks


@pytest.fixture
def alone():
    hvd.init()
    yield
    hvd.shutdown()


@pytest.fixture
def launched(monkeypatch):
    """The environment of rank 0 of 3 under horovodrun."""
    for name, value in {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOROVOD_CONTROLLER", raising=False)
    monkeypatch.setattr(arguments, "mpi_built", lambda: False)


@pytest.fixture
def communicator(monkeypatch):
    class Comm:
        pass

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", types.SimpleNamespace(Comm=Comm))
    return Comm()


def test_one_process(alone):
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (0, 1, 0, 1)
    assert hvd.is_homogeneous() is True
    assert hvd.global_process_set.ranks == (0,)


def test_again_after_shutdown():
    for _ in range(2):
        hvd.init()
        assert hvd.is_initialized()
        hvd.shutdown()
        assert not hvd.is_initialized()


@pytest.mark.parametrize("comm", [None, [], [0], (0,), range(1)])
def test_all_ranks_of_one_process(comm):
    hvd.init(comm)
    assert hvd.size() == 1
    hvd.shutdown()


@pytest.mark.parametrize("comm", [None, [], [0, 1, 2], range(3)])
def test_all_ranks_of_a_job_are_what_the_launcher_started(launched, comm):
    assert arguments.checked_comm(comm) is None


@pytest.mark.parametrize("comm", [[0, 1], [2, 1, 0], [7]])
def test_some_of_the_ranks_need_mpi(launched, monkeypatch, comm):
    with pytest.raises(ValueError, match=r"all ranks in order, \[0, 1, 2\].*hvd.ProcessSet.*Received: comm="):
        hvd.init(comm)
    monkeypatch.setattr(arguments, "mpi_built", lambda: True)
    assert arguments.checked_comm(comm) == comm
    monkeypatch.setenv("HOROVOD_CONTROLLER", "gloo")
    with pytest.raises(ValueError, match="only Horovod on MPI"):
        hvd.init(comm)


def test_mpi_communicators_need_mpi(launched, monkeypatch, communicator):
    with pytest.raises(ValueError, match=r"does not run on MPI; use hvd.ProcessSet"):
        hvd.init(communicator)
    monkeypatch.setattr(arguments, "mpi_built", lambda: True)
    assert arguments.checked_comm(communicator) is communicator


@pytest.mark.parametrize("comm", ["dynamic", [hvd.ProcessSet([0])]])
def test_process_sets_in_first_place(comm):
    with pytest.raises(
        TypeError, match=r"name the process sets, `hvd.init\(process_sets=...\)`. Received: comm="
    ):
        hvd.init(comm)


@pytest.mark.parametrize("comm", [3, "01", [0, 0], [-1], [0.0], [True], object()])
def test_what_is_no_comm(comm):
    with pytest.raises(TypeError, match="`comm` must be None, a list of distinct ranks or an mpi4py comm"):
        hvd.init(comm)
    assert not hvd.is_initialized()


def test_the_global_set_may_be_listed():
    hvd.init(process_sets=[hvd.global_process_set])
    hvd.shutdown()


def test_build_information_without_horovod(monkeypatch, alone):
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    names = ["mpi_built", "mpi_enabled", "gloo_built", "gloo_enabled", "nccl_built", "ddl_built"]
    for name in [*names, "ccl_built", "cuda_built", "rocm_built"]:
        answer = getattr(hvd, name)()
        assert answer == 0
        assert type(answer) is (int if name == "nccl_built" else bool)
    with pytest.raises(ValueError, match="needs Horovod on MPI"):
        hvd.mpi_threads_supported()


def test_timeline_of_one_process(alone, tmp_path):
    hvd.start_timeline(tmp_path / "timeline.json", mark_cycles=True)
    hvd.stop_timeline()
    assert json.loads((tmp_path / "timeline.json").read_text()) == []
    with pytest.raises(ValueError, match=r"`file_path` must be in an existing folder. Received: .*nowhere"):
        hvd.start_timeline(str(tmp_path / "nowhere" / "timeline.json"))


def test_timeline_is_written_by_rank_0(tmp_path):
    def one_rank(comm):
        hvd.start_timeline(tmp_path / f"{comm.rank}.json")
        hvd.stop_timeline()

    run_ranks(2, one_rank)
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]


def test_global_variables_are_refused(alone):
    with pytest.raises(
        RuntimeError, match=r"hvd.broadcast_variables\(model.variables, root_rank=1\).*Callback\(1\)"
    ):
        hvd.broadcast_global_variables(1)


@pytest.mark.parametrize("inplace", [False, True])
def test_broadcast_variables(inplace):
    def one_rank(comm):
        variable = keras.Variable([comm.rank + 1.0, 5.0 * comm.rank])
        hvd.broadcast_variables([variable], root_rank=1, inplace=inplace)
        return variable.numpy().tolist()

    assert run_ranks(3, one_rank) == [[2.0, 5.0]] * 3


def test_numbers_as_tensors_are_asked_anew_whenever_a_graph_runs(alone, monkeypatch):
    numbers = tf.function(lambda: [hvd.size_op(), hvd.rank_op(), hvd.process_set_included_op()])
    assert [number.numpy() for number in numbers()] == [1, 0, 1]
    assert [number.numpy() for number in (hvd.local_size_op(), hvd.local_rank_op())] == [1, 0]
    monkeypatch.setattr(process_comm(), "ranks", (0, 1, 2))
    assert [number.numpy() for number in numbers()] == [3, 0, 1]
    with pytest.raises(ValueError, match=r"`process_set_id` must be .* one of \[0\]. Received: .*=4"):
        hvd.size_op(4)
