"""Pieces of variables, and how fragments are dealt from them: by layers or by elements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import keras

from hvdext.keras_tools.selection import path_of

_STRIDES = 8  # ranges per fragment where the flat sequence of all elements is dealt out


@dataclass(frozen=True, eq=False)
class Piece:
    """A variable, or a range of its elements.

    Attributes:
        variable: a Keras variable.
        start: None for the whole variable, else the first of its flattened elements.
        stop: None for the whole variable, else one past the last.
        kind: "trainable", "non_trainable" (of the model) or "slot" (of the optimizer).
    """

    variable: keras.Variable
    start: int | None = None
    stop: int | None = None
    kind: str = "trainable"

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The variable's shape if it is whole, else (size,)."""
        if self.start is None or self.stop is None:
            return tuple(self.variable.shape)
        return (self.stop - self.start,)

    @property
    def label(self) -> str:
        """The variable's path, with the range of a part: `dense/kernel[0:128]`."""
        path = path_of(self.variable)
        return path if self.start is None else f"{path}[{self.start}:{self.stop}]"

    def part(self, start: int, stop: int) -> Piece:
        """The elements [start, stop) of this piece."""
        if (start, stop) == (0, self.size):
            return self
        offset = self.start or 0
        return Piece(self.variable, offset + start, offset + stop, self.kind)

    def followed_by(self, other: Piece) -> Piece | None:
        """This piece and `other` as one, if they are neighbours in one variable."""
        if other.variable is not self.variable or self.stop is None or other.start != self.stop:
            return None
        if (self.start, other.stop) == (0, math.prod(self.variable.shape)):
            return Piece(self.variable, kind=self.kind)
        return Piece(self.variable, self.start, other.stop, self.kind)


def owner_of(slot, model):
    """The variable that Keras has named `slot` after, or None: `adam/dense_kernel_momentum`."""
    name = path_of(slot).rsplit("/", 1)[-1]
    owners = [v for v in model.trainable_variables if name.startswith(path_of(v).replace("/", "_") + "_")]
    return max(owners, key=lambda owner: len(path_of(owner)), default=None)


def by_layer(pieces: Sequence[Piece], model) -> list[list[Piece]]:
    """The pieces by layer, in the model's order."""
    places: dict[str, int] = {}
    for variable in model.variables:
        places.setdefault(_parent(variable), len(places))
    layers: dict[int, list[Piece]] = {}
    strays = []
    for piece in pieces:
        owner = owner_of(piece.variable, model) if piece.kind == "slot" else piece.variable
        if owner is None or _parent(owner) not in places:
            strays.append(piece)
        else:
            layers.setdefault(places[_parent(owner)], []).append(piece)
    in_order = [layers[place] for place in sorted(layers)] or [[]]
    in_order[-1].extend(strays)
    return in_order


def _parent(variable) -> str:
    return path_of(variable).rpartition("/")[0]


def dealt_layers(layers: list[list[Piece]], fragments: int, order: str) -> list[list[Piece]]:
    """Deals whole layers to `fragments` fragments, in the `order` that `Rotating` describes."""
    if order == "strided":
        runs = [layers[i::fragments] for i in range(fragments)]
    else:
        borders = [len(layers) * i // fragments for i in range(fragments + 1)]
        runs = [layers[a:b] for a, b in itertools.pairwise(borders)]
    return [[piece for layer in run for piece in layer] for run in runs]


def dealt_elements(pieces: Sequence[Piece], elements: int, fragments: int, order: str) -> list[list[Piece]]:
    """Deals the `elements` of `pieces` to `fragments` fragments, in the `order` that `Rotating` describes."""
    rounds = _STRIDES if order == "strided" else 1
    sizes = [_share(elements, i, fragments) for i in range(fragments)]
    dealt: list[list[Piece]] = [[] for _ in range(fragments)]
    queue = (piece for piece in pieces if piece.size)
    piece = next(queue)
    used = 0
    for i in range(rounds):
        for fragment, size in zip(dealt, sizes, strict=True):
            wanted = _share(size, i, rounds)
            while wanted:
                if used == piece.size:
                    piece, used = next(queue), 0
                taken = min(wanted, piece.size - used)
                _append(fragment, piece.part(used, used + taken))
                used += taken
                wanted -= taken
    return dealt


def _share(total: int, i: int, shares: int) -> int:
    """The i-th of `shares` whole numbers that differ by at most one and add up to `total`."""
    return total * (i + 1) // shares - total * i // shares


def _append(fragment: list[Piece], piece: Piece) -> None:
    merged = fragment[-1].followed_by(piece) if fragment else None
    if merged is None:
        fragment.append(piece)
    else:
        fragment[-1] = merged
