"""How errors and ranks are called in messages, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable


def describe(error: BaseException) -> str:
    """An error in one line: its kind and its text; a `ValueError`'s text speaks for itself."""
    text = str(error)
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def named_ranks(ranks: Iterable[int]) -> str:
    """The words for `ranks`: "rank 1", or "ranks 1, 2"."""
    listed = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(listed) != 1)} {', '.join(listed)}"
