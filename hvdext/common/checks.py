"""The rules that arguments share: whole numbers, numbers, choices, "did you mean".

Each `require_*` raises an error that names the argument, the rule and the value received. Whole numbers and
numbers may be NumPy's; what comes back is Python's own, so that ranks that compare settings by how they print
see no difference where there is none.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


def is_whole(value: Any, minimum: int) -> bool:
    """True if `value` is an integer, Python's or NumPy's but no bool, of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return False
    return int(value) >= minimum


def require_whole(name: str, value: Any, minimum: int) -> int:
    """Returns `value` as Python's integer.

    Raises:
        ValueError: unless it is an integer (no bool) of at least `minimum`.
    """
    if not is_whole(value, minimum):
        raise ValueError(f"`{name}` must be an integer of at least {minimum}. Received: {name}={value!r}.")
    return int(value)


def is_number(value: Any) -> bool:
    """True if `value` is a real number, Python's or NumPy's but no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def require_number(name: str, value: Any, holds: Callable[[float], bool], rule: str) -> float:
    """Returns `value` as Python's number (an integer stays one).

    Raises:
        ValueError: "`name` must `rule`", unless `value` is a number (no bool) of which `holds`.
    """
    if not is_number(value) or not holds(float(value)):
        raise ValueError(f"`{name}` must {rule}. Received: {name}={value!r}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def require_positive(name: str, value: Any) -> float:
    """Returns `value` as Python's number.

    Raises:
        ValueError: unless it is a number (no bool) above 0.
    """
    return require_number(name, value, lambda number: number > 0, "be a number above 0")


def require_choice(
    name: str,
    value: Any,
    choices: Sequence[str | int | None],
    others: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raises a `ValueError` unless `value` is one of `choices`; it suggests the nearest word among them.

    Args:
        name: the argument's.
        value: what it has been given.
        choices: what it may be.
        others: what choices are called elsewhere: the choice by the other word.
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        value_or_twin = others.get(value, value) if isinstance(value, str) else value
        hint = did_you_mean(value_or_twin, [choice for choice in choices if isinstance(choice, str)])
        raise ValueError(f"`{name}` must be one of {listed}. Received: {name}={value!r}.{hint}")


def require_rank(rank: Any, size: Any) -> None:
    """Raises a `ValueError` unless `size` ranks exist and `rank` is one of them."""
    require_whole("size", size, 1)
    require_whole("rank", rank, 0)
    if rank >= size:
        raise ValueError(f"`rank` must be below `size`. Received: rank={rank!r}, size={size!r}.")


def nearest(word: Any, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` may be a slip of; None if none is near."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1)), None)


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The hint ending an error: " Did you mean (the nearest of `known`)?"; empty if none is near `word`."""
    near = nearest(word, known)
    return "" if near is None else f" Did you mean {near!r}?"
