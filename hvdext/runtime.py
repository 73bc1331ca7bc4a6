"""`hvd.init()` and what it makes: this process's communicator, its watchdog, its place among the others."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from hvdext import agreement
from hvdext import comm as comm_module
from hvdext.board import shared_board
from hvdext.comm import HorovodComm, SoloComm, current, launched, set_process_comm
from hvdext.ledger import Traffic
from hvdext.process_sets import ProcessSet
from hvdext.watchdog import Watchdog

DEADLINE_SECONDS = 300.0
_SIZE_VARIABLES = ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")

_watchdog: Watchdog | None = None


def init(process_sets: Sequence[ProcessSet] | str | None = None, *, deadline: float | None = None) -> None:
    """Joins the ranks that the launcher started; alone, makes a job of one.

    Call it once, at the top of the script, on every rank. A process that no launcher started (a notebook,
    `python script.py`) becomes the only rank, and then Horovod need not be installed.

    Args:
        process_sets: `ProcessSet` objects to register, the same on all ranks; or "dynamic", to register
            them later with `add_process_set`.
        deadline: seconds that any collective may wait before the process ends with a message that names
            the ranks that have not arrived; default: the environment variable HVDEXT_DEADLINE, or 300.

    Raises:
        ValueError: if an argument breaks its rule.
        ImportError: if a launcher started several processes and Horovod is missing or broken; the message
            says how to build it.
    """
    global _watchdog
    seconds = _deadline(deadline)
    sets = _checked_sets(process_sets)
    if is_initialized():
        return
    if not launched():
        set_process_comm(SoloComm())
        return
    comm = _join(process_sets if isinstance(process_sets, str) else sets)
    set_process_comm(comm)
    if comm.size > 1:
        _report_protections(comm)
        _watchdog = Watchdog(comm.rank, comm.ledger, shared_board(comm), seconds)
        _watchdog.start()


def shutdown() -> None:
    """Leaves the job. Other ranks' collectives then fail; call it on all of them."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
    if isinstance(comm_module._process_comm, HorovodComm):
        from horovod.tensorflow import mpi_ops

        mpi_ops.shutdown()
    set_process_comm(None)


def is_initialized() -> bool:
    """True between `init()` and `shutdown()`."""
    try:
        current()
    except RuntimeError:
        return False
    return True


def rank() -> int:
    """This process's number, 0 to size() - 1."""
    return current().rank


def size() -> int:
    """How many processes there are."""
    return current().size


def local_rank() -> int:
    """This process's number among those on its host."""
    return _engine_number("local_rank", 0)


def local_size() -> int:
    """How many processes are on this host."""
    return _engine_number("local_size", 1)


def cross_rank() -> int:
    """This host's number among the hosts that have a process with this local rank."""
    return _engine_number("cross_rank", 0)


def cross_size() -> int:
    """How many hosts have a process with this local rank."""
    return _engine_number("cross_size", 1)


def verbose(level: int | str = 1) -> int | str:
    """`level` on rank 0, 0 elsewhere: `model.fit(..., verbose=hvd.verbose())` shows one progress bar."""
    return level if rank() == 0 else 0


def barrier() -> None:
    """Returns once every rank has called it."""
    current().barrier("hvdext.barrier.user")


def traffic() -> dict[str, Traffic]:
    """Collectives and bytes of this rank so far, by purpose ("grad", "broadcast", "metrics", ...)."""
    return current().traffic()


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Registers a process set after `init(process_sets="dynamic")`; every rank must call it.

    Raises:
        ValueError: if a set of the same ranks is registered already or a rank does not exist; on every rank
            alike, if the ranks name different sets.
    """
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    comm = current()
    _check_members(process_set, comm.size)
    agreement.check(comm, "add_process_set", {"ranks": process_set.ranks})
    # A set of all ranks is the global one, which Horovod refuses to register again.
    if isinstance(comm, HorovodComm) and process_set.size() < comm.size:
        from horovod.tensorflow import mpi_ops

        mpi_ops.add_process_set(list(process_set.ranks))
    return process_set


def _engine_number(name, alone):
    if isinstance(current(), HorovodComm):
        from horovod.tensorflow import mpi_ops

        return getattr(mpi_ops, name)()
    return alone


def _deadline(deadline):
    text = os.environ.get("HVDEXT_DEADLINE", DEADLINE_SECONDS) if deadline is None else deadline
    try:
        seconds = float(text)
    except (TypeError, ValueError):
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(
            "`deadline` (or HVDEXT_DEADLINE) must be a positive number of seconds. "
            f"Received: deadline={text!r}."
        )
    return seconds


def _checked_sets(process_sets):
    if process_sets is None or process_sets == "dynamic":
        return []
    if isinstance(process_sets, str) or not all(isinstance(s, ProcessSet) for s in process_sets):
        raise ValueError(
            "`process_sets` must be a list of hvd.ProcessSet, or 'dynamic'. "
            f"Received: process_sets={process_sets!r}."
        )
    return list(process_sets)


def _check_members(process_set: ProcessSet, size: int) -> None:
    if process_set.ranks[-1] >= size:
        raise ValueError(f"`process_set` must hold ranks below {size}. Received: {process_set}.")


def _join(process_sets):
    try:
        import horovod.tensorflow as engine
    except ImportError as error:
        raise ImportError(
            "A launcher started several processes, but Horovod cannot be imported for this TensorFlow "
            f"({error}). Build it with `hvdext build-horovod`; `hvdext doctor` says what is wrong."
        ) from error
    if isinstance(process_sets, str):
        engine.init(process_sets=process_sets)
        return HorovodComm()
    # A set of all ranks is the global one, which Horovod refuses to register again.
    size = next((int(os.environ[v]) for v in _SIZE_VARIABLES if v in os.environ), None)
    if size is not None:
        for process_set in process_sets:
            _check_members(process_set, size)
    partial = [s for s in process_sets if s.size() != size]
    engine.init(process_sets=[engine.ProcessSet(list(s.ranks)) for s in partial])
    return HorovodComm()


def _report_protections(comm):
    from hvdext.engine import missing_protections

    if comm.rank == 0:
        for sentence in missing_protections():
            warnings.warn(sentence, stacklevel=3)
