"""A recording of what the engine does when, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import os
from pathlib import Path

from hvdext.comm.current import current
from hvdext.comm.horovod_comm import HorovodComm
from hvdext.common.arguments import suggests_keywords


@suggests_keywords
def start_timeline(file_path: str | os.PathLike, mark_cycles: bool = False) -> None:
    """Begins to record the engine's collectives into a file on rank 0; call it on every rank.

    The engine must have been started with the environment variable HOROVOD_TIMELINE=DYNAMIC. That is not
    the default: the engine's writer thread then keeps one core of rank 0 busy, also while nothing is
    recorded. One process on its own has no engine; its file is an empty recording.

    Args:
        file_path: the file, in JSON; overwritten. Only rank 0 writes.
        mark_cycles: also record when each of the engine's cycles begins.

    Raises:
        RuntimeError: before `hvd.init()`.
        ValueError: if the engine was started without HOROVOD_TIMELINE, or, on rank 0, the file's folder
            does not exist.
    """
    comm = current()
    path = Path(file_path)
    if comm.rank == 0 and not path.absolute().parent.is_dir():
        raise ValueError(f"`file_path` must be in an existing folder. Received: file_path={str(path)!r}.")
    if not isinstance(comm, HorovodComm):
        if comm.rank == 0:
            path.write_text("[]\n")
        return
    from horovod.tensorflow import mpi_ops

    try:
        mpi_ops.start_timeline(str(path), mark_cycles)
    except ValueError as error:
        raise ValueError(
            "hvd.start_timeline() needs the environment variable HOROVOD_TIMELINE=DYNAMIC on every rank, set "
            "before hvd.init(). Received: HOROVOD_TIMELINE="
            f"{os.environ.get('HOROVOD_TIMELINE')!r} ({error})"
        ) from error


def stop_timeline() -> None:
    """Ends the recording and closes the file; call it on every rank. Without a recording: nothing.

    Raises:
        RuntimeError: before `hvd.init()`.
    """
    if isinstance(current(), HorovodComm):
        from horovod.tensorflow import mpi_ops

        mpi_ops.stop_timeline()
