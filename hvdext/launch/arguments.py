"""What `hvd.init` is called with: checked before the engine starts, so that no rank waits for another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from hvdext.comm.build_info import mpi_built
from hvdext.comm.process_sets import ProcessSet, are_ranks, global_process_set, is_mpi_communicator
from hvdext.common.launcher import launched, told_size

DEADLINE_SECONDS = 300.0


def checked_deadline(deadline: float | None) -> float:
    """The deadline in seconds: the argument, else HVDEXT_DEADLINE, else the default.

    Raises:
        ValueError: if it is no positive number.
    """
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


def checked_sets(process_sets: Sequence[ProcessSet] | str | None) -> list[ProcessSet]:
    """The sets to register with the engine; none for "dynamic".

    Raises:
        ValueError: if `process_sets` is something else.
    """
    if process_sets is None or process_sets == "dynamic":
        return []
    if isinstance(process_sets, str) or not all(isinstance(s, ProcessSet) for s in process_sets):
        raise ValueError(
            "`process_sets` must be a list of hvd.ProcessSet, or 'dynamic'. "
            f"Received: process_sets={process_sets!r}."
        )
    return [s for s in process_sets if s is not global_process_set]  # registered by itself


def checked_comm(comm: Any) -> Any:
    """What to hand to the engine as its `comm`: None for all ranks.

    Raises:
        TypeError, ValueError: if `comm` is no communicator, or one that this engine cannot make; before the
            engine starts, so that no rank waits for another.
    """
    if comm is None:
        return None
    if is_mpi_communicator(comm):
        if launched() and not _on_mpi():
            raise ValueError(
                "`comm` must be None where Horovod does not run on MPI; use hvd.ProcessSet for some of the "
                "ranks. Received: comm=an mpi4py communicator."
            )
        return comm
    members = list(comm) if isinstance(comm, Iterable) and not isinstance(comm, str) else [comm]
    if comm == "dynamic" or any(isinstance(member, ProcessSet) for member in members):
        raise TypeError(
            "`comm` comes first, as in Horovod: name the process sets, `hvd.init(process_sets=...)`. "
            f"Received: comm={comm!r}."
        )
    if not isinstance(comm, Iterable) or not are_ranks(members):
        raise TypeError(
            "`comm` must be None, a list of distinct ranks or an mpi4py communicator. "
            f"Received: comm={comm!r}."
        )
    members = [int(member) for member in members]
    size = told_size(os.environ) if launched() else 1
    if not members or (size is not None and members == list(range(size))):
        return None
    if not launched() or not _on_mpi():
        raise ValueError(
            f"`comm` must be None or all ranks in order, {list(range(size or 1))}: only Horovod on MPI can "
            "make a job of some of the ranks. Use `hvd.init(process_sets=[hvd.ProcessSet(ranks)])` and "
            f"`process_set=`. Received: comm={members}."
        )
    return members


def _on_mpi():
    return mpi_built() and os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "mpi"
