"""What fails on one rank fails on all, with the same words: nobody waits for a rank that has gone.

One table says which kind of error all ranks raise, so that the same fault has the same class wherever it
happens: a missing file is a `FileNotFoundError` in a pipeline, in `hvd.deploy` and in a consensus alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from hvdext.comm.communicator import Communicator
from hvdext.common.wording import describe, named_ranks

Told: TypeAlias = tuple[str, str]  # the kind's name and the words of an error, as they travel

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
    raise_for(comm.ranks, comm.allgather_object(mine, name), what, error)


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
    raise_for(comm.ranks, [problem for _, problem in everyone], what, error)
    return [value for value, _ in everyone]


def alike(comm: Communicator, action: Callable[[], Any], what: str, name: str) -> Any:
    """Returns what `action()` has returned on this rank, once it has succeeded on all, which call it.

    Args:
        comm: who waits for whom.
        action: the same on all; its result stays where it is.
        what: for the message: what could not be done.
        name: the collective's name, the same on every rank.

    Raises:
        Exception: on every rank alike: where all have failed with the same words, what `action` has raised,
            otherwise as `raise_on_all` does.
    """
    value, error = None, None
    try:
        value = action()
    except Exception as raised:  # whatever a user's function raises: the others are waiting
        error = raised
    everyone = comm.allgather_object(None if error is None else told(error), name)
    if error is not None and len(set(everyone)) == 1:
        raise error
    raise_for(comm.ranks, everyone, what, error)
    return value


def on_root(comm: Communicator, action: Callable[[], Any], root: int, what: str, name: str) -> Any:
    """Returns on every rank what `action()` returned on rank `root`. Every rank of `comm` calls it.

    Args:
        comm: who waits for whom.
        action: called on `root` alone; may fail, which is heard by all. Its result must pickle.
        root: who acts, as a rank of `comm`.
        what: for the message: what could not be done.
        name: the collective's name, the same on every rank.

    Raises:
        Exception: as `raise_on_all` does, if `action()` raises.
    """
    value, error = None, None
    if comm.rank == root:
        try:
            value = action()
        except Exception as raised:  # whatever it is, the others must not wait for a result
            error = raised
    value, failure = comm.broadcast_object((value, None if error is None else told(error)), root, name)
    raise_for(comm.ranks, [failure if rank == root else None for rank in range(comm.size)], what, error)
    return value


def told(error: Exception, where: str = "") -> Told:
    """What other ranks are told of `error`: its kind's name and its words. It always pickles.

    Args:
        error: what went wrong on this rank.
        where: what this rank was at, to stand before the words.
    """
    kind = next((cls.__name__ for cls in _KINDS if isinstance(error, cls)), "RuntimeError")
    return kind, f"{where}: {describe(error)}" if where else describe(error)


def raise_for(
    ranks: Sequence[int],
    everyone: Sequence[Told | None],
    what: str,
    error: Exception | None,
    advice: str = "",
) -> None:
    """Raises what `raise_on_all` does, where the ranks have heard of each other in another message.

    Args:
        ranks: the global ranks that may have failed.
        everyone: what each of them told, in the same order; None of one that has not failed.
        what: for the message: what could not be done.
        error: this rank's own.
        advice: the message's last line, the same on every rank.
    """
    failed = {rank: problem for rank, problem in zip(ranks, everyone, strict=True) if problem is not None}
    if not failed:
        return
    words: dict[str, list[int]] = {}
    for rank, (_, text) in failed.items():
        words.setdefault(text, []).append(rank)
    lines = [f"  {named_ranks(ranks)}: {text}" for text, ranks in words.items()]
    kind = next(iter(failed.values()))[0]
    raised = next((cls for cls in _KINDS if cls.__name__ == kind), RuntimeError)
    raise raised("\n".join([f"{what}:", *lines, *([advice] if advice else [])])) from error
