"""Gradients that stay on their rank: what all ranks must know of them.

Each rank may have others, of other shapes and another number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdext.gradients.exchange import GradientExchange
from hvdext.keras_tools.selection import path_of


def local_on_any(exchange: GradientExchange, variables: Sequence) -> list[str]:
    """The paths of what stays local on any rank: the same on every rank, and all of them call it, eagerly.

    Args:
        exchange: who exchanges what.
        variables: all that this rank trains.
    """
    shared = exchange.is_shared(variables)
    mine = [path_of(v) for v, s in zip(variables, shared, strict=True) if not s]
    everyone = exchange.comm().allgather_object(mine, "hvdext.agreement.local")
    return list(dict.fromkeys(path for paths in everyone for path in paths))


def shared_of(values: Sequence, shared: Sequence[bool]) -> list:
    """Those of `values`, one per variable, that belong to exchanged ones."""
    return [value for value, s in zip(values, shared, strict=True) if s]


def placed(values: Sequence, shared: Sequence[bool]) -> list[Any]:
    """One value per variable from those that belong to exchanged ones; None for the others."""
    rest = iter(values)
    return [next(rest) if s else None for s in shared]
