"""How errors and ranks are called in messages, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable


def describe(error: BaseException) -> str:
    """An error in one line: its kind and its text; a `ValueError`'s text speaks for itself."""
    text = str(error)
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def shortened(text: str, head: int, tail: int, note: str = "") -> str:
    """A long text without its middle: what it is about stands at its beginning, the cause often at its end.

    Args:
        text: any.
        head: characters of its beginning that stay.
        tail: characters of its end that stay.
        note: said of what is left out.
    """
    left_out = len(text) - head - tail
    if left_out <= 0:
        return text
    return f"{text[:head]} [... {left_out} characters{note} ...] {text[len(text) - tail :]}"


def named_ranks(ranks: Iterable[int]) -> str:
    """The words for `ranks`: "rank 1", or "ranks 1, 2"."""
    listed = [str(rank) for rank in ranks]
    return f"rank{'s' * (len(listed) != 1)} {', '.join(listed)}"
