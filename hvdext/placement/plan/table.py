"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdext.placement.plan.assignment import Assignment


_PLACES = (
    "place",
    "layers",
    "parameters",
    "weights",
    "memory",
    "flops",
    "seconds",
    "arriving",
    "share",
    "from",
    "to",
)
_CROSSINGS = ("crossing", "places", "per sample", "dtype", "shape")


def as_text(plan: Assignment) -> str:
    """What each place carries, from which layer to which, and what crosses."""
    blocks = [_head(plan), _aligned(_places(plan), left=("from", "to"))]
    if plan.crossings:
        blocks.append(_aligned(_crossings(plan), left=("crossing", "places", "dtype", "shape")))
    return "\n\n".join(blocks)


def _head(plan: Assignment) -> str:
    return (
        f"{plan.model}: {len(plan.graph.placed)} layers at {plan.places} place{'s' * (plan.places > 1)}, "
        f"balanced by {plan.balance}; memory for batches of {plan.batch_size} and {plan.slots} optimizer "
        "slots"
    )


def _places(plan: Assignment) -> Sequence[Sequence[str]]:
    """A row for each place, under their titles; seconds only where they have been measured."""
    rows = [_PLACES, *(_place(plan, place) for place in range(plan.places))]
    if plan.balance == "measured":
        return rows
    unmeasured = _PLACES.index("seconds")
    return [(*row[:unmeasured], *row[unmeasured + 1 :]) for row in rows]


def _place(plan: Assignment, place: int) -> tuple[str, ...]:
    cost = plan.costs[place]
    names = [path for path in plan.layers_of(place) if not plan.graph.by_path[path].is_input]
    return (
        str(place),
        str(cost.layers),
        f"{cost.parameters:,}",
        bytes_text(cost.weight_bytes),
        bytes_text(cost.memory_bytes),
        count_text(cost.flops),
        f"{cost.seconds:.3g}",
        bytes_text(cost.arriving_bytes) if cost.arriving_bytes else "-",
        f"{100 * cost.share:.1f} %",
        names[0],
        names[-1],
    )


def _crossings(plan: Assignment) -> Sequence[Sequence[str]]:
    """A row for each tensor that goes from one place to another, under their titles."""
    rows: list[Sequence[str]] = [_CROSSINGS]
    for crossing in plan.crossings:
        tensor = crossing.tensor
        shape = ", ".join("?" if axis is None else str(axis) for axis in tensor.shape)
        places = f"{crossing.source} -> {crossing.target}"
        rows.append((tensor.name, places, bytes_text(tensor.bytes), tensor.dtype, f"({shape})"))
    return rows


def bytes_text(size: float) -> str:
    """A number of bytes as people read it: "26.4 MB"."""
    return _in_thousands(size, (" B", " kB", " MB", " GB"), " TB")


def count_text(number: float) -> str:
    """A number of operations or elements as people read it: "5.51 G"."""
    return _in_thousands(number, ("", " k", " M", " G"), " T")


def _in_thousands(number: float, units: Sequence[str], largest: str) -> str:
    for unit in units:
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}{largest}"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """Columns side by side: those named in `left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_left = [title in left for title in rows[0]]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, is_left, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
