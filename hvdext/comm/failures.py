"""What fails on one rank fails on all, with the same words: nobody waits for a rank that has gone.

One table says which kind of error all ranks raise, so that the same fault has the same class wherever it
happens: a missing file is a `FileNotFoundError` in a pipeline, in `hvd.deploy` and in a consensus alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdext.comm.communicator import Communicator
from hvdext.common.wording import describe, named_ranks

# Of these the error that all ranks raise is one as well, the first that fits; of others a RuntimeError.
_KINDS: tuple[type[Exception], ...] = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    TimeoutError,
    OSError,
    ImportError,
    TypeError,
    ValueError,
)


def raise_on_all(comm: Communicator, error: Exception | None, what: str, name: str) -> None:
    """Returns on all ranks if none has failed, otherwise raises on all. Every rank of `comm` calls it.

    Args:
        comm: who waits for whom.
        error: what went wrong on this rank; None if nothing did.
        what: for the message: what could not be done.
        name: the collective's name, the same on every rank.

    Raises:
        Exception: on every rank alike, if any has failed: of the first failed rank's kind where that is a
            file's, a time-out, an import's, a `TypeError` or a `ValueError`, otherwise a `RuntimeError`. It
            names the ranks and their errors, and on a rank that failed it comes from the rank's own.
    """
    mine = None if error is None else told(error)
    raise_for(comm, comm.allgather_object(mine, name), what, error)


def on_all(comm: Communicator, action: Callable[[], Any], what: str, name: str) -> list:
    """Returns what `action()` returned on each rank, in rank order. Every rank of `comm` calls it.

    Args:
        comm: who waits for whom.
        action: this rank's own; may fail, which is heard by all. Its result must pickle.
        what: for the message: what could not be done.
        name: the collective's name, the same on every rank.

    Raises:
        Exception: as `raise_on_all` does, if `action()` raises on any rank.
    """
    value, error = None, None
    try:
        value = action()
    except Exception as raised:  # whatever a user's function, data or model raises: the others are waiting
        error = raised
    everyone = comm.allgather_object((value, None if error is None else told(error)), name)
    raise_for(comm, [problem for _, problem in everyone], what, error)
    return [value for value, _ in everyone]


def told(error: Exception) -> tuple[str, str]:
    """What other ranks are told of `error`: its kind's name and its words. It always pickles."""
    kind = next((cls.__name__ for cls in _KINDS if isinstance(error, cls)), "RuntimeError")
    return kind, describe(error)


def raise_for(
    comm: Communicator, everyone: list[tuple[str, str] | None], what: str, error: Exception | None
) -> None:
    """Raises what `raise_on_all` does, where the ranks have heard of each other in another message.

    Args:
        comm: the ranks.
        everyone: what each rank told, in rank order; None of one that has not failed.
        what: for the message: what could not be done.
        error: this rank's own.
    """
    failed = {comm.ranks[place]: problem for place, problem in enumerate(everyone) if problem is not None}
    if not failed:
        return
    words: dict[str, list[int]] = {}
    for rank, (_, text) in failed.items():
        words.setdefault(text, []).append(rank)
    lines = [f"  {named_ranks(ranks)}: {text}" for text, ranks in words.items()]
    kind = next(iter(failed.values()))[0]
    raised = next((cls for cls in _KINDS if cls.__name__ == kind), RuntimeError)
    raise raised("\n".join([f"{what}:", *lines])) from error
