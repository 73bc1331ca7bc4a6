"""What fails on one rank fails on all, with the same words: nobody waits for a rank that has gone."""

from __future__ import annotations

from hvdext.comm import Communicator

# Of these the error that all ranks raise is one as well; of others a RuntimeError.
_KINDS: tuple[type[Exception], ...] = (
    FileNotFoundError,
    PermissionError,
    TimeoutError,
    OSError,
    ImportError,
    TypeError,
    ValueError,
)


def tell(comm: Communicator, error: Exception | None, what: str, name: str) -> None:
    """Every rank calls it after a step that may have failed, with its own error or None.

    Args:
        comm: who took the step.
        error: what went wrong on this rank.
        what: for the message: what could not be done.
        name: the collective's.

    Raises:
        Exception: on every rank alike, if any has failed; of the first failed rank's kind.
    """
    mine = None if error is None else (_kind(error), f"{error}" or type(error).__name__)
    everyone = comm.allgather_object(mine, name)
    failed = {comm.ranks[place]: told for place, told in enumerate(everyone) if told is not None}
    if not failed:
        return
    words: dict[str, list[int]] = {}
    for rank, (_, text) in failed.items():
        words.setdefault(text, []).append(rank)
    lines = [f"  {_ranks(ranks)}: {text}" for text, ranks in words.items()]
    cls = next((c for c in _KINDS if c.__name__ == next(iter(failed.values()))[0]), RuntimeError)
    raise cls("\n".join([f"{what}:", *lines])) from error


def _kind(error: Exception) -> str:
    return next((cls.__name__ for cls in _KINDS if isinstance(error, cls)), "RuntimeError")


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
