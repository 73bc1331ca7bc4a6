"""Where this process is among the others: ranks, hosts, who prints."""

from __future__ import annotations

from hvdext.comm.current import current
from hvdext.comm.horovod_comm import HorovodComm
from hvdext.comm.ledger import Traffic
from hvdext.common.arguments import suggests_keywords


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


@suggests_keywords
def verbose(level: int | str = 1) -> int | str:
    """`level` on rank 0, 0 elsewhere: `model.fit(..., verbose=hvd.verbose())` shows one progress bar."""
    comm = current()
    return level if comm.ranks[comm.rank] == 0 else 0


def barrier() -> None:
    """Returns once every rank has called it."""
    current().barrier("hvdext.barrier.user")


def traffic() -> dict[str, Traffic]:
    """Collectives and bytes of this rank so far, by purpose ("grad", "broadcast", "metrics", ...)."""
    return current().traffic()


def is_homogeneous() -> bool:
    """True if every host has the same number of processes."""
    if isinstance(current(), HorovodComm):
        from horovod.tensorflow import mpi_ops

        return mpi_ops.is_homogeneous()
    return True


def _engine_number(name, alone):
    if isinstance(current(), HorovodComm):
        from horovod.tensorflow import mpi_ops

        return getattr(mpi_ops, name)()
    return alone
