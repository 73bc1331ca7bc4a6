"""Which launcher started this process, and where that puts it among the ranks.

The one place that knows launchers' environment variables. Four kinds are told apart: horovodrun with Gloo,
MPI's own (`mpirun`, `horovodrun --mpi`), Slurm's `srun`, and none: then this process is the only rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Each MPI's variables for this process, in one order. Slurm's own come last: `srun --mpi=pmix` tells
# PMIX_RANK, and the number of processes nowhere else.
_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_LOCAL_RANKS = (
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMIX_LOCAL_RANK"),
    "SLURM_LOCALID",
)
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class RankInfo:
    """Where one rank stands, as its launcher tells.

    Attributes:
        rank: this process's number, 0 to size - 1.
        size: how many ranks there are.
        local_rank: its number among those on this host.
        local_size: how many are on this host.
        kv_store: `host:port` of horovodrun's key-value server; None without.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    kv_store: str | None = None

    @property
    def one_host(self) -> bool:
        """True if all ranks are on this host."""
        return self.local_size == self.size


def launched(environ: Mapping[str, str] = os.environ) -> bool:
    """True if a launcher that Horovod understands (horovodrun, mpirun, srun --mpi) started this process.

    Args:
        environ: the process's environment.
    """
    # A lone number of processes counts, too: it must not train alone for want of a rank.
    sizes = _SIZES[:-1]  # Slurm's is set for each `srun`, also where no MPI joins the processes
    return any(name in environ for name in ("HOROVOD_RANK", *_RANKS, *sizes))


def on_mpi(environ: Mapping[str, str]) -> bool:
    """True if an MPI launcher (mpirun, `horovodrun --mpi`, srun --mpi) started this process.

    Args:
        environ: the process's environment.
    """
    # horovodrun with Gloo may itself be started by an MPI launcher; its ranks inherit that one's variables.
    gloo = (
        "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ or environ.get("HOROVOD_CONTROLLER", "").lower() == "gloo"
    )
    return not gloo and any(name in environ for name in _RANKS)


def started(environ: Mapping[str, str]) -> int:
    """How many processes the launcher started, as far as it tells; 1 without a launcher.

    Args:
        environ: a process's environment.

    Raises:
        ValueError: if a variable of the launcher's is no number.
    """
    if not on_mpi(environ):
        return _number(environ, ("HOROVOD_SIZE",), 1)
    return max(_number(environ, _SIZES, 1), _number(environ, _RANKS, 0) + 1)


def told_size(environ: Mapping[str, str]) -> int | None:
    """How many processes the launcher says it started; None if it does not say.

    Args:
        environ: a process's environment.

    Raises:
        ValueError: if a variable of the launcher's is no number.
    """
    return _number(environ, _SIZES if on_mpi(environ) else ("HOROVOD_SIZE",), None)


def kv_store_address(environ: Mapping[str, str]) -> str | None:
    """`host:port` of the key-value server that horovodrun keeps open; None under another launcher.

    Args:
        environ: a process's environment.
    """
    host, port = (environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}") for part in ("ADDR", "PORT"))
    return f"{host}:{port}" if host and port else None


def is_elastic(environ: Mapping[str, str]) -> bool:
    """True if the launcher starts anew what is lost (`horovodrun --host-discovery-script`).

    Args:
        environ: a process's environment.
    """
    return "HOROVOD_ELASTIC" in environ


def rank_info(environ: Mapping[str, str]) -> RankInfo:
    """Where this process stands among the ranks; without a launcher, alone.

    Args:
        environ: its environment.

    Raises:
        ValueError: if a variable of the launcher's is no number, or rank and size contradict each other.
    """
    if on_mpi(environ):
        info = RankInfo(
            rank=_number(environ, _RANKS, 0),
            size=started(environ),
            local_rank=_number(environ, _LOCAL_RANKS, 0),
            local_size=_number(environ, _LOCAL_SIZES, 1),
        )
    else:
        info = RankInfo(
            rank=_number(environ, ("HOROVOD_RANK",), 0),
            size=started(environ),
            local_rank=_number(environ, ("HOROVOD_LOCAL_RANK",), 0),
            local_size=_number(environ, ("HOROVOD_LOCAL_SIZE",), 1),
            kv_store=kv_store_address(environ),
        )
    if not 0 <= info.rank < info.size or not 0 <= info.local_rank < max(info.local_size, 1):
        raise ValueError(f"the launcher's rank must be below its number of ranks. Received: {info}.")
    return info


def check_engine(mpi_built: bool, environ: Mapping[str, str]) -> None:
    """Refuses an engine that would leave each process training alone; before the engine starts.

    Args:
        mpi_built: whether Horovod was built with MPI.
        environ: the process's environment.

    Raises:
        RuntimeError: if MPI started several processes and the engine has no MPI.
    """
    number = started(environ)
    if number > 1 and on_mpi(environ) and not mpi_built:
        raise RuntimeError(
            f"An MPI launcher ({_name(environ)}) started {number} processes, but this Horovod was built "
            "without MPI, so each of them would train alone. Build MPI in with `hvdext build-horovod "
            f"--with-mpi`, or start the script with `horovodrun -np {number}`, which needs no MPI."
        )


def check_size(size: int, environ: Mapping[str, str]) -> None:
    """Refuses an engine that has joined fewer processes than were started.

    Args:
        size: how many processes the engine has joined.
        environ: the process's environment.

    Raises:
        RuntimeError: if the launcher belongs to another MPI than the one that Horovod was built with.
    """
    number = started(environ)
    if on_mpi(environ) and size < number:
        raise RuntimeError(
            f"An MPI launcher ({_name(environ)}) started {number} processes, but Horovod has joined {size} "
            "of them: the launcher must belong to the MPI that Horovod was built with. Put that MPI's mpirun "
            "first on PATH, or build again with `hvdext build-horovod --with-mpi --force`."
        )


def _name(environ):
    if "OMPI_COMM_WORLD_RANK" in environ:
        return "mpirun"
    return "srun" if "SLURM_STEP_NUM_TASKS" in environ else "mpiexec"


def _number(environ: Mapping[str, str], names: Sequence[str], default):
    for name in names:
        if name in environ:
            try:
                return int(environ[name])
            except ValueError:
                raise ValueError(f"{name} must be a whole number. Received: {environ[name]!r}.") from None
    return default
