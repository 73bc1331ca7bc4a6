"""The rules that numbers among the answers share."""

from __future__ import annotations

import numbers
from collections.abc import Callable


def require_int(name: str, value: object, minimum: int) -> None:
    """Raises a `ValueError` unless `value` is Python's own integer (no bool) of at least `minimum`.

    Not NumPy's: ranks compare the answers by how they print.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}. Received: {name}={value!r}.")


def require_real(name: str, value: object, holds: Callable[[float], bool], rule: str) -> None:
    """Raises a `ValueError`, "`name` must `rule`", unless `value` is a number (no bool) of which `holds`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not holds(float(value)):
        raise ValueError(f"`{name}` must {rule}. Received: {name}={value!r}.")
