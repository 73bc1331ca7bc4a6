"""Which communicator this process (or thread) uses."""

from __future__ import annotations

import threading

from hvdext.comm.communicator import Communicator

_process_comm: Communicator | None = None
_thread = threading.local()


def current() -> Communicator:
    """The communicator that `hvd.init()` made for this process.

    Raises:
        RuntimeError: if `hvd.init()` has not been called.
    """
    comm = current_or_none()
    if comm is None:
        raise RuntimeError(
            "hvdext has not been initialised: call `hvd.init()` at the top of the script, before "
            "anything that trains, shards or broadcasts."
        )
    return comm


def current_or_none() -> Communicator | None:
    """As `current`; None before `hvd.init()`."""
    return getattr(_thread, "comm", None) or _process_comm


def process_comm() -> Communicator | None:
    """The communicator of the whole process, whatever this thread uses; None before `hvd.init()`."""
    return _process_comm


def set_process_comm(comm: Communicator | None) -> None:
    """Makes `comm` what `current()` returns in this process."""
    global _process_comm
    _process_comm = comm


class use:
    """Context in which `current()` returns `comm` in this thread."""

    def __init__(self, comm: Communicator):
        self._comm = comm

    def __enter__(self) -> Communicator:
        self._outer = getattr(_thread, "comm", None)
        _thread.comm = self._comm
        return self._comm

    def __exit__(self, *exc_info) -> None:
        _thread.comm = self._outer
