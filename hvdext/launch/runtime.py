"""`hvd.init()` and what it makes: this process's communicator, its watchdog, its place among the others."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from hvdext.comm.build_info import mpi_built
from hvdext.comm.communicator import Communicator, SoloComm
from hvdext.comm.current import current, process_comm, set_process_comm
from hvdext.comm.guards import Guards
from hvdext.comm.horovod_comm import HorovodComm
from hvdext.comm.kv_store import shared_store
from hvdext.comm.process_sets import ProcessSet
from hvdext.comm.registration import require_members
from hvdext.comm.watchdog import Watchdog
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice
from hvdext.common.launcher import check_engine, check_size, is_elastic, launched, told_size
from hvdext.common.log import set_rank, warn
from hvdext.launch.arguments import checked_comm, checked_deadline, checked_sets
from hvdext.launch.gpus import CHOICES, take_gpu
from hvdext.launch.rendezvous import meet_again

_watchdog: Watchdog | None = None
_joins = 0  # how often this process has joined a launcher's job
_settings: dict[str, Any] = {}  # for a restart


@suggests_keywords
def init(
    comm: Sequence[int] | Any | None = None,
    process_sets: Sequence[ProcessSet] | str | None = None,
    *,
    deadline: float | None = None,
    check_every: int = 200,
    on_divergence: str = "raise",
    gpus: str | None = "local_rank",
) -> None:
    """Joins the ranks that the launcher started; alone, makes a job of one.

    Call it once, at the top of the script, on every rank. A process that no launcher started (a notebook,
    `python script.py`) becomes the only rank, and then Horovod need not be installed. After `shutdown()` it
    may be called again; compile models anew then.

    Args:
        comm: None or all ranks in order: the launcher's job. Where Horovod runs on MPI, also some of the
            ranks, or an mpi4py communicator; elsewhere use a `ProcessSet` for some of the ranks.
        process_sets: `ProcessSet` objects to register, the same on all ranks; or "dynamic", to register
            them later with `add_process_set`.
        deadline: seconds that any collective may wait before the process ends with a message that names
            the ranks that have not arrived; default: the environment variable HVDEXT_DEADLINE, or 300.
        check_every: how many updates of a `DistributedOptimizer` lie between two looks whether all ranks
            still hold the same weights, optimizer state, learning rate and epoch. The first is before the
            first update of every `fit`. 0: never.
        on_divergence: what happens if they do not. "raise": an error on every rank, before the update.
            "broadcast": all go on with the first rank's values, which says so.
        gpus: "local_rank": on a host with GPUs TensorFlow sees only the one with this process's local rank,
            and takes its memory as it needs it, unless the script has chosen before. None: devices are left
            alone, as they are where no launcher started the process.

    Raises:
        ValueError: if an argument breaks its rule.
        ImportError: if a launcher started several processes and Horovod is missing or broken; the message
            says how to build it.
        RuntimeError: if this Horovod cannot join the processes that the launcher started.
        TimeoutError: when called again, if another rank does not call it again within the deadline.
    """
    global _watchdog, _joins, _settings
    seconds = checked_deadline(deadline)
    sets = checked_sets(process_sets)
    chosen = checked_comm(comm)
    guards = Guards(check_every, on_divergence)
    require_choice("gpus", gpus, CHOICES)
    if is_initialized():
        return
    dynamic = process_sets if isinstance(process_sets, str) else None
    _settings = {"deadline": seconds, "process_sets": dynamic, "gpus": gpus, **dataclasses.asdict(guards)}
    if not launched():
        set_process_comm(SoloComm())
        set_rank(0)
        return
    if gpus is not None:
        take_gpu(os.environ)
    if _joins:
        meet_again(_joins, seconds)
    job = _join(chosen, process_sets if isinstance(process_sets, str) else sets)
    _joins += 1
    if chosen is None:
        check_size(job.size, os.environ)
    guards.keep_for(job)
    set_process_comm(job)
    set_rank(job.rank)
    if job.size > 1:
        report_protections(job)
        store = shared_store(job)
        if store is not None:
            store.post(str(job.rank), "")  # instead of what this process told before an earlier shutdown
        _watchdog = Watchdog(job.rank, job.ledger, store, seconds, elastic=is_elastic(os.environ))
        _watchdog.start()


def shutdown() -> None:
    """Leaves the job. Other ranks' collectives then fail; call it on all of them."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
    if isinstance(process_comm(), HorovodComm):
        from horovod.tensorflow import mpi_ops

        mpi_ops.shutdown()
    set_process_comm(None)
    set_rank(None)


def restart() -> None:
    """Leaves the job and joins it again, as elastic training does when ranks have left or come.

    The deadline stays. Process sets that `init` registered are gone, since the ranks are numbered anew.
    """
    shutdown()
    init(**_settings)


def is_initialized() -> bool:
    """True between `init()` and `shutdown()`."""
    try:
        current()
    except RuntimeError:
        return False
    return True


def _join(comm, process_sets):
    try:
        import horovod.tensorflow as engine
    except ImportError as error:
        raise ImportError(
            "A launcher started several processes, but Horovod cannot be imported for this TensorFlow "
            f"({error}). Build it with `hvdext build-horovod`; `hvdext doctor` says what is wrong."
        ) from error
    check_engine(mpi_built(), os.environ)
    if isinstance(process_sets, str):
        engine.init(comm, process_sets)
        return HorovodComm()
    made_of_comms = [s for s in process_sets if s.mpi_comm is not None]
    made_of_ranks = [s for s in process_sets if s.mpi_comm is None]
    size = told_size(os.environ) if comm is None else None
    if size is not None:
        for process_set in made_of_ranks:
            require_members(process_set, size)
    # A set of all ranks is the global one, which Horovod refuses to register again.
    partial = [s for s in made_of_ranks if s.size() != size]
    engines = [engine.ProcessSet(s.mpi_comm) for s in made_of_comms]
    engine.init(comm, [*engines, *(engine.ProcessSet(list(s.ranks)) for s in partial)])
    for process_set, registered in zip(made_of_comms, engines, strict=True):
        process_set.learn_ranks(registered.ranks)
    return HorovodComm()


def report_protections(comm: Communicator) -> None:
    """Warns, on rank 0, of each protection against hanging that this Horovod lacks."""
    from hvdext.engine import missing_protections

    if comm.rank == 0:
        for sentence in missing_protections():
            warn(sentence)
