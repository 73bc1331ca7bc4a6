"""The rules that arguments of `hvdext.data` share; each raises a `ValueError` naming all three."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


def require_int(name: str, value: Any, minimum: int) -> None:
    """Raises unless `value` is an integer (no bool) of at least `minimum`."""
    is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_int or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}. Received: {name}={value!r}.")


def require_positive(name: str, value: Any) -> None:
    """Raises unless `value` is a number (no bool) above 0."""
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not is_number or not value > 0:
        raise ValueError(f"`{name}` must be a number above 0. Received: {name}={value!r}.")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}. Received: {name}={value!r}.")


def require_rank(rank: Any, size: Any) -> None:
    """Raises unless `size` ranks exist and `rank` is one of them."""
    require_int("size", size, 1)
    require_int("rank", rank, 0)
    if rank >= size:
        raise ValueError(f"`rank` must be below `size`. Received: rank={rank!r}, size={size!r}.")
