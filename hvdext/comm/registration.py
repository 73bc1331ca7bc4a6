"""Process sets made known to the engine while it runs, and taken back."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.comm.horovod_comm import HorovodComm
from hvdext.comm.process_sets import ProcessSet, registered_sets
from hvdext.common.arguments import suggests_keywords


@suggests_keywords
def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Registers a process set after `init(process_sets="dynamic")`; every rank must call it.

    Args:
        process_set: the set, or its global ranks.

    Returns:
        The set; a new one, if ranks were given.

    Raises:
        RuntimeError: before `hvd.init()`.
        ValueError: if a rank does not exist; on every rank alike, if a set of the same ranks is registered
            already (the set of all ranks excepted, which always is), if the ranks name different sets, or
            without `process_sets="dynamic"`.
    """
    comm = current()
    if not isinstance(process_set, ProcessSet):
        process_set = ProcessSet(process_set)
    require_members(process_set, comm.size)
    agreement.check(comm, "add_process_set", {"ranks": process_set.ranks})
    # A set of all ranks is the global one, which Horovod refuses to register again.
    if not isinstance(comm, HorovodComm) or process_set.size() == comm.size:
        return process_set
    if process_set.process_set_id is not None:
        raise ValueError(
            "`process_set` must not be registered already. "
            f"Received: {process_set}; registered: {sorted(map(list, registered_sets()))}."
        )
    _check_dynamic(process_set)
    from horovod.tensorflow import mpi_ops

    mpi_ops.add_process_set(list(process_set.ranks))
    return process_set


@suggests_keywords
def remove_process_set(process_set: ProcessSet) -> bool:
    """Takes back the registration of a process set; every rank must call it.

    Afterwards no set of these ranks can be used until it is added again.

    Args:
        process_set: the set.

    Returns:
        True if it was registered; False for one that was not, and for all ranks, which stay registered.

    Raises:
        RuntimeError: before `hvd.init()`.
        TypeError: if `process_set` is not a `ProcessSet`.
        ValueError: on every rank alike, if the ranks name different sets, or without
            `init(process_sets="dynamic")`.
    """
    comm = current()
    if not isinstance(process_set, ProcessSet):
        raise TypeError(f"`process_set` must be a hvd.ProcessSet. Received: process_set={process_set!r}.")
    agreement.check(comm, "remove_process_set", {"ranks": process_set.ranks})
    number = process_set.process_set_id
    if not isinstance(comm, HorovodComm) or not number:
        return False
    _check_dynamic(process_set)
    from horovod.tensorflow import mpi_ops

    comm.forget(process_set.ranks)
    return mpi_ops._basics._remove_process_set_impl(number) is not None


def require_members(process_set: ProcessSet, size: int) -> None:
    """Raises a `ValueError` unless all ranks of `process_set` are below `size`."""
    if process_set.ranks[-1] >= size:
        raise ValueError(f"`process_set` must hold ranks below {size}. Received: {process_set}.")


def _check_dynamic(process_set):
    """The engine reads the variable when it starts; changed later, it answers with an error of its own."""
    if os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS", "0") in ("", "0"):
        raise ValueError(
            "`process_set` can only be added or removed after `hvd.init(process_sets='dynamic')`. "
            f"Received: {process_set}."
        )
