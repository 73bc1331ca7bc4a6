"""The arithmetic of slices: which part of a weight is whose. Knows neither ranks that talk nor layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MARK = "_hvdext_slice"


@dataclass(frozen=True)
class Slice:
    """One of `count` equal, contiguous parts along an axis.

    Attributes:
        axis: of the whole, from 0.
        index: which part, 0 to count - 1.
        count: how many parts.
    """

    axis: int
    index: int
    count: int

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The part's shape where the whole has the shape `whole`, whose axis the parts divide."""
        return tuple(n // self.count if i == self.axis else n for i, n in enumerate(whole))

    def of(self, whole: Any) -> Any:
        """This part of an array or tensor with a static shape along the axis."""
        length = whole.shape[self.axis] // self.count
        start = self.index * length
        return whole[(slice(None),) * self.axis + (slice(start, start + length),)]

    def __str__(self) -> str:
        return f"slice {self.index} of {self.count} along axis {self.axis}"


def cut_axis(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """The axis along which a part with one shape was cut off a whole with the other; None: not at all.

    Raises:
        ValueError: if the shapes differ in another way.
    """
    axes = [i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b]
    if len(part) != len(whole) or len(axes) > 1 or any(whole[i] % part[i] for i in axes if part[i]):
        raise ValueError(f"{tuple(part)} is no slice of {tuple(whole)}.")
    return axes[0] if axes else None


def require_divides(count: int, layer: str, argument: str, value: int) -> None:
    """Refuses what `count` ranks cannot share equally.

    Raises:
        ValueError: if `count` does not divide `value`.
    """
    if value % count:
        raise ValueError(
            f"`{argument}` must be a multiple of the number of slices, {count}. "
            f"Received: {argument}={value} in layer {layer!r}."
        )


def mark(variable: Any, part: Slice, comm: Any) -> None:
    """Notes that a variable holds `part`, and the ranks of `comm` the others.

    On the TensorFlow variable in it as well: either may be handed to what asks.
    """
    for holder in (variable, variable.value):
        setattr(holder, _MARK, (part, comm))


def mark_of(variable: Any) -> tuple[Slice, Any] | None:
    """What `mark` has noted: the slice and the communicator of its group; None for whole variables."""
    return getattr(variable, _MARK, None)
