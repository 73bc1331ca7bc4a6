"""Where this process is among the others: ranks, hosts, who prints."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

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


# -- the same as tensors, asked anew whenever a graph runs: after elastic restarts they are others -----------


@suggests_keywords
def rank_op(name: str | None = None) -> tf.Tensor:
    """`rank()` as an int32 scalar."""
    return _number(rank, name)


@suggests_keywords
def size_op(process_set_id: int = 0, name: str | None = None) -> tf.Tensor:
    """How many ranks the process set with this number has, as an int32 scalar; 0: all."""
    return _number(lambda: len(_members(process_set_id)), name)


@suggests_keywords
def local_rank_op(name: str | None = None) -> tf.Tensor:
    """`local_rank()` as an int32 scalar."""
    return _number(local_rank, name)


@suggests_keywords
def local_size_op(name: str | None = None) -> tf.Tensor:
    """`local_size()` as an int32 scalar."""
    return _number(local_size, name)


@suggests_keywords
def process_set_included_op(process_set_id: int = 0, name: str | None = None) -> tf.Tensor:
    """1 if this rank is in the process set with this number, otherwise 0, as an int32 scalar."""
    return _number(lambda: int(current().ranks[current().rank] in _members(process_set_id)), name)


def _number(ask: Callable[[], int], name: str | None) -> tf.Tensor:
    ask()  # what is wrong is said at once
    number = tf.numpy_function(lambda: np.int32(ask()), [], tf.int32, name=name)
    number.set_shape(())
    return number


def _members(process_set_id):
    known = {number: ranks for ranks, number in current().registered_sets().items()}
    if process_set_id not in known:
        raise ValueError(
            f"`process_set_id` must be the number of a registered process set, one of {sorted(known)}. "
            f"Received: process_set_id={process_set_id!r}."
        )
    return known[process_set_id]
