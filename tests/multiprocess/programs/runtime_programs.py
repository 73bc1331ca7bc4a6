"""The engine's own answers, its timeline, and a second job in the same processes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import tensorflow as tf

from hvdext.comm.current import current
from tests.multiprocess.programs.exchange_programs import (
    Program,
    applied,
    assert_all,
    everyone,
    gradients_of,
    mean,
)

_TRANSPORTS = ("mpi_built", "mpi_enabled", "gloo_built", "gloo_enabled")
_BUILT = (*_TRANSPORTS, "nccl_built", "ddl_built", "ccl_built", "cuda_built", "rocm_built")


def _run_answers(hvd):
    import horovod.tensorflow as engine

    return {
        "ours": [getattr(hvd, name)() for name in _BUILT],
        "engine's": [getattr(engine, name)() for name in _BUILT],
        "homogeneous": hvd.is_homogeneous(),
        "all": [list(hvd.global_process_set.ranks), hvd.global_process_set.rank()],
        "threads": _error(hvd.mpi_threads_supported) if not hvd.mpi_enabled() else "needs",
    }


def _check_answers(ranks):
    size = len(ranks)
    for rank, answers in enumerate(ranks):
        assert answers["ours"] == answers["engine's"]
        assert answers["ours"][0] or answers["ours"][2]  # one of them carries this very job
        assert answers["homogeneous"] is True
        assert answers["all"] == [list(range(size)), rank]
        assert "needs" in answers["threads"]


def _run_refused_jobs(hvd):
    hvd.init([0, 1])  # what there is already
    first = _error(lambda: hvd.init([0]))
    second = _error(lambda: hvd.init([hvd.ProcessSet([0])]))
    return [first, second, _error(lambda: hvd.start_timeline("timeline.json"))]


def _check_refused_jobs(ranks):
    assert ranks[0] == ranks[1]
    assert "`comm` must be None or all ranks in order, [0, 1]" in ranks[0][0]
    assert "hvd.init(process_sets=...)" in ranks[0][1]
    assert "HOROVOD_TIMELINE=DYNAMIC" in ranks[0][2]
    assert not Path("timeline.json").exists()


def _run_second_job(hvd):
    """Once with timeline and process sets, once as at first."""
    os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"
    hvd.shutdown()
    before = hvd.is_initialized()
    hvd.init(process_sets="dynamic", deadline=50)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "timeline.json")
        hvd.start_timeline(file, mark_cycles=True)
        total = _total(hvd)
        hvd.barrier()
        hvd.stop_timeline()
        events = json.loads(file.read_text()) if file.exists() else []
    numbers = _add_and_remove(hvd)
    averages = applied(hvd, gradients_of(hvd.rank()))
    hvd.barrier()  # who leaves first ends the engine
    del os.environ["HOROVOD_TIMELINE"], os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"]
    hvd.shutdown()
    hvd.init(deadline=60)
    return {
        "before": before,
        "totals": [total, _total(hvd)],
        "numbers": numbers,
        "averages": averages,
        "named": any("hvdext.demo.total" in str(event.get("args")) for event in events),
        "cycles": any(event["name"] == "CYCLE_START" for event in events if "name" in event),
    }


def _total(hvd):
    comm = current()
    return comm.allreduce([tf.constant(10.0**comm.rank)], "hvdext.demo.total")[0].numpy().item()


def _add_and_remove(hvd):
    """A set of rank 1 alone: added, used, removed, refused, added again."""
    lonely = hvd.ProcessSet([1])
    numbers = [lonely.process_set_id]
    hvd.add_process_set(lonely)
    numbers.append(lonely.process_set_id)
    twice = _error(lambda: hvd.add_process_set([1]))
    removed = [hvd.remove_process_set(hvd.ProcessSet([1])), hvd.remove_process_set(lonely)]
    removed.append(hvd.remove_process_set(hvd.global_process_set))
    numbers.append(lonely.process_set_id)
    hvd.add_process_set([1])
    numbers.append(lonely.process_set_id)
    return [*numbers, *removed, twice]


def _check_second_job(ranks):
    for rank, result in enumerate(ranks):
        assert result["before"] is False
        assert result["totals"] == [11.0, 11.0]
        assert result["numbers"][:3] == [None, 1, None]
        assert result["numbers"][3] >= 1
        assert result["numbers"][4:7] == [True, False, False]
        assert "`process_set` must not be registered already" in result["numbers"][7]
        assert [result["named"], result["cycles"]] == [rank == 0] * 2  # rank 0 writes
    assert_all([np_arrays(result["averages"]) for result in ranks], mean(everyone(2)))


def np_arrays(values):
    return [np.asarray(value) for value in values]


def _error(action):
    try:
        action()
    except (ValueError, TypeError) as error:
        return str(error)
    return "no error"


PROGRAMS = {
    "engine's answers": Program(_run_answers, _check_answers, sizes=(2, 4)),
    "refused jobs": Program(_run_refused_jobs, _check_refused_jobs, sizes=(2,)),
    "second job": Program(_run_second_job, _check_second_job, sizes=(2,)),
}
