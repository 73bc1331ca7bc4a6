"""Where this process stands among the ranks, as its launcher tells; without a launcher, alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvdext.engine import launchers

_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
_LOCAL_RANKS = (
    *("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMIX_LOCAL_RANK"),
    "SLURM_LOCALID",
)
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class Place:
    """One rank.

    Attributes:
        rank: 0 is the front.
        size: how many ranks there are.
        local_rank: among those on this host.
        local_size: how many are on this host.
        board: `host:port` of horovodrun's key-value server; None without.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    board: str | None = None

    @property
    def one_host(self) -> bool:
        """True if all ranks are on this host."""
        return self.local_size == self.size


def find_place(environ: Mapping[str, str]) -> Place:
    """This process's place.

    Args:
        environ: its environment.

    Raises:
        ValueError: if a variable of the launcher's is no number, or rank and size contradict each other.
    """
    if not launchers.on_mpi(environ):
        size = _number(environ, ("HOROVOD_SIZE",), 1)
        host, port = (environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}") for part in ("ADDR", "PORT"))
        place = Place(
            rank=_number(environ, ("HOROVOD_RANK",), 0),
            size=size,
            local_rank=_number(environ, ("HOROVOD_LOCAL_RANK",), 0),
            local_size=_number(environ, ("HOROVOD_LOCAL_SIZE",), 1),
            board=f"{host}:{port}" if host and port else None,
        )
    else:
        place = Place(
            rank=_number(environ, _RANKS, 0),
            size=launchers.started(environ),
            local_rank=_number(environ, _LOCAL_RANKS, 0),
            local_size=_number(environ, _LOCAL_SIZES, 1),
        )
    if not 0 <= place.rank < place.size or not 0 <= place.local_rank < max(place.local_size, 1):
        raise ValueError(f"the launcher's rank must be below its number of ranks. Received: {place}.")
    return place


def _number(environ, names, default):
    for name in names:
        if name in environ:
            try:
                return int(environ[name])
            except ValueError:
                raise ValueError(f"{name} must be a whole number. Received: {environ[name]!r}.") from None
    return default
