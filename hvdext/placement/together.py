"""What one rank does while the others wait: if it fails there, it fails on all of them."""

from __future__ import annotations

from hvdext.comm import Communicator

# Callers tell these apart: a file that cannot be read from a file that holds something else.
_KINDS = (OSError, ValueError)


def raise_together(comm: Communicator, what: str, error: Exception | None) -> None:
    """Returns on all ranks if none has failed, otherwise raises on all. Every rank of `comm` calls it.

    Args:
        comm: who waits for whom.
        what: was tried, for the message.
        error: what went wrong on this rank, None if nothing did.

    Raises:
        OSError: on every rank alike, if the first rank that failed did so with one.
        ValueError: the same.
        RuntimeError: on every rank alike, if it failed with anything else.
    """
    mine = None
    if error is not None:
        kind = next((i for i, kind in enumerate(_KINDS) if isinstance(error, kind)), None)
        mine = kind, f"{type(error).__name__}: {error}"
    everyone = comm.allgather_object(mine, "hvdext.placement.problem")
    for rank, problem in zip(comm.ranks, everyone, strict=True):
        if problem is not None:
            kind, text = problem
            raised = RuntimeError if kind is None else _KINDS[kind]
            raise raised(f"{what} has failed on rank {rank}: {text}") from error
