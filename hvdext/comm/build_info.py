"""What the engine was built with and runs on; without Horovod: nothing."""

from __future__ import annotations

from typing import Any

from hvdext.comm.current import current


def mpi_built() -> bool:
    """True if Horovod was compiled with MPI."""
    return bool(_ask("mpi_built"))


def mpi_enabled() -> bool:
    """True if Horovod runs on MPI in this process."""
    return bool(_ask("mpi_enabled"))


def mpi_threads_supported() -> bool:
    """True if MPI may be used from several threads, so that mpi4py and Horovod can be mixed.

    Raises:
        RuntimeError: before `hvd.init()`.
        ValueError: if Horovod does not run on MPI.
    """
    current()
    if not mpi_enabled():
        raise ValueError(
            "hvd.mpi_threads_supported() needs Horovod on MPI; ask hvd.mpi_enabled() first. "
            "Received: Horovod without MPI."
        )
    return bool(_ask("mpi_threads_supported"))


def gloo_built() -> bool:
    """True if Horovod was compiled with Gloo."""
    return bool(_ask("gloo_built"))


def gloo_enabled() -> bool:
    """True if Horovod runs on Gloo in this process."""
    return bool(_ask("gloo_enabled"))


def nccl_built() -> int:
    """NCCL's version code if Horovod was compiled with NCCL, else 0."""
    return int(_ask("nccl_built"))


def ddl_built() -> bool:
    """True if Horovod was compiled with IBM's DDL."""
    return bool(_ask("ddl_built"))


def ccl_built() -> bool:
    """True if Horovod was compiled with oneCCL."""
    return bool(_ask("ccl_built"))


def cuda_built() -> bool:
    """True if Horovod was compiled with CUDA."""
    return bool(_ask("cuda_built"))


def rocm_built() -> bool:
    """True if Horovod was compiled with ROCm."""
    return bool(_ask("rocm_built"))


def _ask(question: str) -> Any:
    try:
        from horovod.tensorflow import mpi_ops
    except ImportError:  # not built for this TensorFlow; one process needs none
        return 0
    return getattr(mpi_ops, question)()
