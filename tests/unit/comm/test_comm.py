"""Communicators: alone, as threads, and what happens when somebody is missing."""

import ast
import gc
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext import engine
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import current, set_process_comm, use
from hvdext.comm.ledger import Traffic
from hvdext.launch import runtime
from hvdext.testing import Room, run_ranks

# -- alone ---------------------------------------------------------------------------------------------


def test_alone_everything_comes_back():
    comm = SoloComm()
    x = tf.constant([1.0, 2.0])
    (summed,) = comm.allreduce([x], "hvdext.test", prescale=0.5, postscale=3.0)
    np.testing.assert_array_equal(summed, [1.5, 3.0])
    np.testing.assert_array_equal(comm.allgather(x, "hvdext.test"), x)
    np.testing.assert_array_equal(comm.alltoall(x, [2], "hvdext.test"), x)
    np.testing.assert_array_equal(comm.broadcast([x], 0, "hvdext.test")[0], x)
    assert comm.allgather_object({"a": 1}, "hvdext.test") == [{"a": 1}]
    assert comm.broadcast_object("a", 0, "hvdext.test") == "a"
    comm.barrier("hvdext.test")
    assert comm.traffic() == {}


def test_alone_only_the_set_of_rank_0_exists():
    comm = SoloComm()
    assert comm.subset([0]) is comm
    with pytest.raises(ValueError, match="must contain the rank"):
        comm.subset([1])


# -- several ranks -------------------------------------------------------------------------------------


class _Garbage:
    """Lets other threads run when it is collected."""

    def __init__(self):
        self._cycle = self

    def __del__(self):
        time.sleep(1e-5)


@pytest.mark.slow
def test_ranks_may_parse_while_garbage_is_collected():
    source = "\n".join(f"x = [{i}, (x, f(x + {i}))]" for i in range(100))

    def trees(comm):
        for _ in range(50):
            _Garbage()
            ast.parse(source)

    parse, thresholds = ast.parse, gc.get_threshold()
    gc.set_threshold(100)
    try:
        run_ranks(3, trees)  # a SystemError where trees are built side by side
    finally:
        gc.set_threshold(*thresholds)
    assert ast.parse is parse


def _collectives(comm):
    rank = comm.rank
    summed = comm.allreduce([tf.fill([2], rank + 1.0), tf.constant(10.0 * rank)], "hvdext.sum", postscale=0.5)
    return {
        "sum": [x.numpy().tolist() for x in summed],
        "gather": comm.allgather(tf.fill([rank, 1], rank), "hvdext.gather").numpy().ravel().tolist(),
        "alltoall": comm.alltoall(tf.range(3) + 10 * rank, [1, 1, 1], "hvdext.alltoall").numpy().tolist(),
        "broadcast": comm.broadcast([tf.constant(rank)], 2, "hvdext.broadcast")[0].numpy().item(),
        "objects": comm.allgather_object("x" * rank, "hvdext.objects"),
        "object": comm.broadcast_object([rank] * rank, 2, "hvdext.object"),
        "bool": comm.allgather(tf.constant([rank == 1]), "hvdext.bool").numpy().tolist(),
        "traffic": comm.traffic(),
    }


def test_collectives_of_three_ranks():
    for rank, found in enumerate(run_ranks(3, _collectives)):
        assert found["sum"] == [[3.0, 3.0], 15.0]  # (1 + 2 + 3) / 2, (0 + 10 + 20) / 2
        assert found["gather"] == [1, 2, 2]
        assert found["alltoall"] == [rank, 10 + rank, 20 + rank]
        assert found["broadcast"] == 2
        assert found["objects"] == ["", "x", "xx"]
        assert found["object"] == [2, 2]
        assert found["bool"] == [False, True, False]
        # Three float32: 2 (n - 1) / n of 12 bytes.
        assert found["traffic"]["sum"] == Traffic(1, 16)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", "uint32", "int64", "bool", "float16", "bfloat16", "float64"]
)
def test_every_type_is_summed_or_moved(dtype):
    def run(comm):
        x = tf.cast([comm.rank, 1], dtype)
        gathered = comm.allgather(x, "hvdext.gather")
        (summed,) = comm.allreduce([x], "hvdext.sum")
        assert gathered.dtype == summed.dtype == x.dtype
        return tf.cast(gathered, tf.float64).numpy().tolist(), tf.cast(summed, tf.float64).numpy().tolist()

    for gathered, summed in run_ranks(2, run):
        assert gathered == [0, 1, 1, 1]
        assert summed == ([1, 1] if dtype == "bool" else [1, 2])


def test_reductions_of_three_ranks():
    def run(comm):
        x = tf.constant([comm.rank + 1.0, -2.0 * comm.rank])
        return [
            comm.allreduce([x, x[:1]], f"hvdext.{op}", op=op)[0].numpy().tolist()
            for op in ("min", "max", "product")
        ]

    assert run_ranks(3, run) == [[[1.0, -4.0], [3.0, 0.0], [6.0, 0.0]]] * 3


def test_rows_of_a_sum_are_dealt_out():
    def run(comm):
        x = tf.reshape(tf.range(7), [7, 1]) * (comm.rank + 1)
        ints = comm.reducescatter(x, "hvdext.rows")
        small = comm.reducescatter(tf.cast(x, tf.uint8), "hvdext.small")
        floats = comm.reducescatter(tf.cast(x, tf.float32), "hvdext.scaled", prescale=0.5, postscale=4.0)
        assert small.dtype == tf.uint8
        np.testing.assert_array_equal(tf.cast(small, tf.int32), ints)
        np.testing.assert_array_equal(floats, 2 * ints)
        return ints.numpy().ravel().tolist(), comm.traffic()["rows"]

    # Factors 1 + 2 + 3; 28 bytes, of which two thirds leave.
    rows = [[0, 6, 12], [18, 24], [30, 36]]
    assert run_ranks(3, run) == [(r, Traffic(1, 18)) for r in rows]


def test_alone_reductions_come_back():
    comm, x = SoloComm(), tf.constant([1.0, 2.0])
    np.testing.assert_array_equal(comm.allreduce([x], "hvdext.test", op="max")[0], x)
    np.testing.assert_array_equal(comm.reducescatter(x, "hvdext.test", prescale=3.0), [3.0, 6.0])
    assert comm.join("hvdext.test") == 0


def test_wrong_reductions():
    x = [tf.constant(1.0)]
    with pytest.raises(ValueError, match="`op` must be one of"):
        SoloComm().allreduce(x, "hvdext.test", op="mean")
    with pytest.raises(ValueError, match="`prescale` and `postscale` need op='sum'"):
        SoloComm().allreduce(x, "hvdext.test", op="min", prescale=2.0)


def test_threads_cannot_join():
    with pytest.raises(NotImplementedError, match="ThreadComm cannot join"):
        run_ranks(2, lambda comm: comm.join("hvdext.join"))


def test_lambdas_travel_and_what_does_not_pickle_is_named_on_every_rank():
    def run(comm):
        rank = comm.rank
        found = [f(1) for f in comm.allgather_object(lambda x: x + rank, "hvdext.lambdas")]
        messages = []
        for send in (
            lambda: comm.allgather_object(threading.Lock() if rank == 1 else 1, "hvdext.lock"),
            lambda: comm.broadcast_object(threading.Lock(), 0, "hvdext.root"),
        ):
            with pytest.raises(ValueError, match="`obj` must be an object that pickles") as caught:
                send()
            messages.append(str(caught.value).splitlines()[1])
        return found, messages

    for found, (gathered, root) in run_ranks(3, run):
        assert found == [1, 2, 3]
        assert gathered.startswith("  rank 1: lock: ")
        assert root.startswith("  rank 0: lock: ")


@pytest.mark.slow
def test_a_function_may_meet_new_collectives_when_it_is_traced_again():
    def run(comm):
        traces = []

        @tf.function
        def step(x, exchange):
            traces.append(exchange)
            return comm.allreduce([x], "hvdext.late")[0] if exchange else x

        results = [float(step(tf.constant(1.0), exchange)) for exchange in (False, True, True)]
        return results, traces

    assert run_ranks(2, run) == [([1.0, 2.0, 2.0], [False, True])] * 2


@pytest.mark.parametrize("name", ["grad", "hvdext", "hvdext.a b", "hvdext..a"])
def test_collectives_have_proper_names(name):
    with pytest.raises(ValueError, match="`name` must look like"):
        run_ranks(2, lambda comm: comm.allreduce([tf.constant(1)], name))


def test_a_subset_talks_among_itself():
    def run(comm):
        half = comm.subset([0, 2] if comm.rank % 2 == 0 else [1, 3])
        (summed,) = half.allreduce([tf.constant(comm.rank)], "hvdext.half")
        return half.rank, half.ranks, int(summed)

    assert run_ranks(4, run) == [(0, (0, 2), 2), (0, (1, 3), 4), (1, (0, 2), 2), (1, (1, 3), 4)]


# -- somebody is missing -------------------------------------------------------------------------------


def test_a_wait_in_the_room_names_the_missing_ranks():
    room = Room(timeout=0.1)
    with pytest.raises(TimeoutError, match=r"hvdext.x: rank 1 waited 0.1 s for ranks \[0, 2\]"):
        room.swap("hvdext.x", 1, (0, 1, 2), None)


def test_the_first_error_wakes_the_others():
    def run(comm):
        if comm.rank == 1:
            raise ZeroDivisionError("mine")
        comm.barrier("hvdext.wait")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run_ranks(3, run, timeout=60)


def test_threads_have_their_own_communicator():
    assert run_ranks(3, lambda comm: (hvd.rank(), hvd.size(), current() is comm)) == [
        (rank, 3, True) for rank in range(3)
    ]


# -- hvd.init and what it checks -----------------------------------------------------------------------


@pytest.fixture
def clean_process():
    set_process_comm(None)
    yield
    set_process_comm(None)


@pytest.mark.parametrize("wrong", [0, -1, "soon", float("nan")])
def test_a_wrong_deadline(wrong, clean_process):
    with pytest.raises(ValueError, match=r"`deadline` \(or HVDEXT_DEADLINE\) must be a positive number"):
        hvd.init(deadline=wrong)
    assert not hvd.is_initialized()


def test_a_wrong_deadline_from_the_environment(clean_process, monkeypatch):
    monkeypatch.setenv("HVDEXT_DEADLINE", "never")
    with pytest.raises(ValueError, match="deadline='never'"):
        hvd.init()


@pytest.mark.parametrize("wrong", ["static", [[0, 1]], [hvd.ProcessSet([0]), 3]])
def test_wrong_process_sets(wrong, clean_process):
    with pytest.raises(ValueError, match=r"`process_sets` must be a list of hvd.ProcessSet, or 'dynamic'"):
        hvd.init(process_sets=wrong)


@pytest.mark.parametrize("wrong", [[], [0, 0], [-1], [0.5], [True]])
def test_wrong_ranks_of_a_process_set(wrong):
    with pytest.raises(ValueError, match="`ranks_or_comm` must be distinct, non-negative integers"):
        hvd.ProcessSet(wrong)


def test_a_process_on_its_own(clean_process, monkeypatch):
    monkeypatch.setattr(runtime, "launched", lambda: False)
    with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
        hvd.rank()
    hvd.init()
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (0, 1, 0, 1)
    assert (hvd.cross_rank(), hvd.cross_size(), hvd.verbose(2)) == (0, 1, 2)
    with pytest.raises(
        ValueError, match=r"`process_set` must hold ranks below 1. Received: ProcessSet\(\[1\]\)"
    ):
        hvd.add_process_set([1])
    hvd.shutdown()
    assert not hvd.is_initialized()


def test_what_the_engine_lacks_is_said_once(monkeypatch):
    sentences = ["The first protection is missing.", "So is the second."]
    monkeypatch.setattr(engine, "missing_protections", lambda: sentences)

    def run(comm):
        runtime.report_protections(comm)
        comm.barrier("hvdext.test.reported")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_ranks(3, run)
    assert [str(warning.message) for warning in caught] == sentences


def test_only_rank_0_says_what_the_engine_lacks(monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "missing_protections", lambda: asked.append(hvd.rank()) or ["Missing."])

    def run(comm):
        if comm.rank != 0:
            runtime.report_protections(comm)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_ranks(3, run)
    assert asked == []


def test_launched_without_an_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setenv("HOROVOD_RANK", "0")
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(ImportError, match="Build it with `hvdext build-horovod`"):
        hvd.init()


def test_ranks_must_add_the_same_set():
    with pytest.raises(ValueError, match=r"add_process_set:\n  ranks: rank 0: \(0, 1\); rank 1: \(0,\)"):
        run_ranks(2, lambda comm: hvd.add_process_set([0] if comm.rank else [0, 1]))


def test_a_set_of_all_ranks_can_be_added_and_used():
    def run(comm):
        everybody = hvd.add_process_set(range(comm.size))
        (summed,) = comm.subset(everybody.ranks).allreduce([tf.constant(comm.rank + 1)], "hvdext.all")
        return everybody.ranks, int(summed)

    assert run_ranks(3, run) == [((0, 1, 2), 6)] * 3


def test_only_rank_0_talks():
    assert run_ranks(3, lambda comm: hvd.verbose("auto")) == ["auto", 0, 0]


def test_nested_communicators():
    with use(SoloComm()) as outer:
        with use(SoloComm()) as inner:
            assert current() is inner
        assert current() is outer
