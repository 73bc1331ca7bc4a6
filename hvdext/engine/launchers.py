"""Which launcher started this process, and whether an engine can join the processes it started."""

from __future__ import annotations

from collections.abc import Mapping

# Each launcher's variables for this process's number and for how many processes there are. Slurm's own come
# last: `srun --mpi=pmix` tells PMIX_RANK, and the number of processes nowhere else.
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def on_mpi(environ: Mapping[str, str]) -> bool:
    """True if an MPI launcher (mpirun, `horovodrun --mpi`, srun --mpi) started this process.

    Args:
        environ: the process's environment.
    """
    # horovodrun with Gloo may itself be started by an MPI launcher; its ranks inherit that one's variables.
    gloo = (
        "HOROVOD_GLOO_RENDEZVOUS_ADDR" in environ or environ.get("HOROVOD_CONTROLLER", "").lower() == "gloo"
    )
    return not gloo and any(name in environ for name in _MPI_RANKS)


def started(environ: Mapping[str, str]) -> int:
    """How many processes the launcher started, as far as it tells; 1 without a launcher.

    Args:
        environ: a process's environment.
    """
    if not on_mpi(environ):
        return int(environ.get("HOROVOD_SIZE", "1"))
    size = next((int(environ[name]) for name in _MPI_SIZES if name in environ), 1)
    rank = next(int(environ[name]) for name in _MPI_RANKS if name in environ)
    return max(size, rank + 1)


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
