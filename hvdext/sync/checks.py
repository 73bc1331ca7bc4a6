"""The rule that whole numbers among the answers share."""

from __future__ import annotations


def require_int(name: str, value: object, minimum: int) -> None:
    """Raises a `ValueError` unless `value` is Python's own integer (no bool) of at least `minimum`.

    Not NumPy's: ranks compare the answers by how they print.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}. Received: {name}={value!r}.")
