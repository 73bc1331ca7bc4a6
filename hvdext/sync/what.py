"""What is exchanged: which variables, and in how many fragments that take turns.

An answer turns a model and its optimizer into fragments, each a list of pieces. It looks at paths, shapes
and dtypes only, so that all ranks cut alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import keras
import tensorflow as tf

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice, require_whole
from hvdext.keras_tools.selection import check_select, path_of
from hvdext.sync.pieces import Piece, by_layer, dealt_elements, dealt_layers, owner_of

_BY = ("layers", "bytes")
_ORDER = ("strided", "sequential")


class What:
    """Base of the answers to "what is exchanged".

    Attributes:
        count: the number of fragments.
    """

    count: int = 1

    def fragments(self, model: keras.Model, optimizer=None) -> list[list[Piece]]:
        """Cuts what is selected into `count` fragments, each element in exactly one of them.

        Args:
            model: a built Keras model.
            optimizer: its optimizer; needed, and built, where slots are selected.

        Raises:
            ValueError: if nothing is selected, there are too few layers or elements for the fragments, or
                slots are selected and there are none yet.
        """
        raise NotImplementedError

    def __invert__(self) -> What:
        raise ValueError(f"`~` needs an answer that leaves something out. Received: ~{self!r}.")


@dataclass(frozen=True)
class All(What):
    """Everything of the kinds chosen, in one fragment.

    Args:
        trainable: the model's trainable variables.
        non_trainable: its other floating-point variables: batch-norm statistics and frozen weights. Counters
            and the states of random generators always stay each rank's own.
        slots: the optimizer's floating-point variables that belong to the model's, such as momentum; not its
            step count, learning rate or loss scale.

    Raises:
        ValueError: if all three are False.
    """

    trainable: bool = True
    non_trainable: bool = True
    slots: bool = False

    @suggests_keywords
    def __init__(self, *, trainable: bool = True, non_trainable: bool = True, slots: bool = False):
        _set_kinds(self, trainable, non_trainable, slots)

    def fragments(self, model: keras.Model, optimizer=None) -> list[list[Piece]]:
        """As in `What`."""
        return [_candidates(self, model, optimizer)]


@dataclass(frozen=True, repr=False)
class Matching(What):
    """The variables whose paths match, in one fragment; `~Matching(...)` is all others of the same kinds.

    Partial sync, for example: `Matching("*/kernel")`, or all but the head: `~Matching("head/*")`.

    Args:
        *patterns: shell-style patterns for the whole path (`"*/kernel"`), one by one or as one list, of which
            one must match; or one function that takes a variable and returns a bool, the same on all ranks.
        trainable: as in `All`.
        non_trainable: as in `All`.
        slots: as in `All`; a slot has a path of its own, such as `adam/dense_kernel_momentum`.

    Raises:
        TypeError: if `patterns` are neither.
        ValueError: if there is none, or all kinds are False.
    """

    patterns: tuple[str, ...] | Callable[[object], bool]
    trainable: bool = True
    non_trainable: bool = True
    slots: bool = False
    complement: bool = False

    @suggests_keywords
    def __init__(
        self,
        *patterns: str | Sequence[str] | Callable[[object], bool],
        trainable: bool = True,
        non_trainable: bool = True,
        slots: bool = False,
    ):
        alone = len(patterns) == 1 and (callable(patterns[0]) or isinstance(patterns[0], (list, tuple)))
        chosen: Any = patterns[0] if alone else patterns
        check_select(chosen, "patterns")
        object.__setattr__(self, "patterns", chosen if callable(chosen) else tuple(chosen))
        _set_kinds(self, trainable, non_trainable, slots)
        object.__setattr__(self, "complement", False)

    def fragments(self, model: keras.Model, optimizer=None) -> list[list[Piece]]:
        """As in `What`.

        Raises:
            ValueError: also if any single pattern matches nothing.
        """
        pieces = _candidates(self, model, optimizer)
        matches = self._matches([piece.variable for piece in pieces])
        chosen = [p for p, m in zip(pieces, matches, strict=True) if m != self.complement]
        if not chosen:
            raise ValueError(
                "`patterns` must leave at least one variable to exchange. "
                f"Received: {self!r}, where all match: {[piece.label for piece in pieces]}."
            )
        return [chosen]

    def __invert__(self) -> Matching:
        kinds = {"trainable": self.trainable, "non_trainable": self.non_trainable, "slots": self.slots}
        other = Matching(self.patterns, **kinds)
        object.__setattr__(other, "complement", not self.complement)
        return other

    def __repr__(self) -> str:
        # Ranks compare it, and a function's own repr holds its address.
        named = [_name_of(self.patterns)] if callable(self.patterns) else [repr(p) for p in self.patterns]
        kinds = [f"{kind}={getattr(self, kind)}" for kind in ("trainable", "non_trainable", "slots")]
        return f"{'~' * self.complement}Matching({', '.join(named + kinds)})"

    def _matches(self, variables) -> list[bool]:
        paths = [path_of(variable) for variable in variables]
        if callable(self.patterns):
            matches = [bool(self.patterns(variable)) for variable in variables]
            _require_match(matches, _name_of(self.patterns), paths)
            return matches
        columns = []
        for pattern in self.patterns:
            columns.append([fnmatchcase(path, pattern) for path in paths])
            _require_match(columns[-1], repr(pattern), paths)
        return [any(row) for row in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Rotating(What):
    """Cuts a selection into fragments that are exchanged in turn: each time a part, over time all of it.

    The fragments of Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) are `by="layers"` with either
    order. With layers and elements in the model's order:

        layers, strided      layer i goes to fragment i mod `fragments`
        layers, sequential   runs of neighbouring layers; their numbers differ by at most one
        bytes, sequential    one range of the elements per fragment, across the borders of variables
        bytes, strided       8 * `fragments` ranges of the elements, dealt out in turn

    By bytes, the fragments' numbers of elements differ by at most one, so that every message has the same
    size.

    Args:
        fragments: how many, at least 1.
        by: "layers" (the variables with one parent path stay together, and slots with the variable that they
            belong to; a slot whose name does not tell goes with the last layer) or "bytes".
        order: "strided" or "sequential".
        what: the selection that is cut; None: `All()`.

    Raises:
        TypeError: if `what` is no selection.
        ValueError: if an argument breaks its rule.
    """

    count: int
    by: str = "layers"
    order: str = "strided"
    what: What = field(default_factory=All)

    @suggests_keywords
    def __init__(
        self, fragments: int, *, by: str = "layers", order: str = "strided", what: What | None = None
    ):
        count = require_whole("fragments", fragments, 1)
        require_choice("by", by, _BY)
        require_choice("order", order, _ORDER)
        if what is not None and (not isinstance(what, What) or isinstance(what, Rotating)):
            raise TypeError(f"`what` must be All(...), Matching(...) or ~Matching(...). Received: {what!r}.")
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "by", by)
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "what", All() if what is None else what)

    def fragments(self, model: keras.Model, optimizer=None) -> list[list[Piece]]:
        """As in `What`."""
        (pieces,) = self.what.fragments(model, optimizer)
        layers = by_layer(pieces, model)
        if self.by == "layers":
            self._require_enough(len(layers), "layers")
            return dealt_layers(layers, self.count, self.order)
        elements = sum(piece.size for piece in pieces)
        self._require_enough(elements, "elements")
        return dealt_elements([p for layer in layers for p in layer], elements, self.count, self.order)

    def __repr__(self) -> str:
        return f"Rotating({self.count}, by={self.by!r}, order={self.order!r}, what={self.what!r})"

    def _require_enough(self, available, things):
        if self.count > available:
            raise ValueError(
                f"`fragments` must be at most the number of {things} selected, {available}. "
                f"Received: fragments={self.count}."
            )


# -- which variables there are ------------------------------------------------------------------------


def _set_kinds(what, trainable, non_trainable, slots):
    kinds = {"trainable": trainable, "non_trainable": non_trainable, "slots": slots}
    for name, value in kinds.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}.")
        object.__setattr__(what, name, value)
    if not any(kinds.values()):
        raise ValueError(
            "`trainable`, `non_trainable` and `slots` must not all be False: nothing is left to exchange. "
            f"Received: {kinds}."
        )


def _candidates(what, model, optimizer) -> list[Piece]:
    """The pieces of the kinds that `what` chooses, whole variables all of them."""
    pieces = []
    if what.trainable:
        pieces += [Piece(v, kind="trainable") for v in model.trainable_variables]
    if what.non_trainable:
        pieces += [Piece(v, kind="non_trainable") for v in model.non_trainable_variables if _is_averaged(v)]
    if what.slots:
        pieces += [Piece(v, kind="slot") for v in _slots(model, optimizer)]
    if not pieces:
        raise ValueError(
            "`trainable`, `non_trainable` and `slots` must choose at least one variable of a built model. "
            f"Received: {what!r}, which chooses none of {[path_of(v) for v in model.variables]}."
        )
    return pieces


def _is_averaged(variable) -> bool:
    return tf.as_dtype(variable.dtype).is_floating  # step counts and random generators hold integers


def _slots(model, optimizer):
    """The floating optimizer variables that belong to the model's.

    What belongs to none is a single number: a learning rate, a loss scale, Nadam's running product.
    """
    if optimizer is None or not optimizer.built:
        received = "no optimizer" if optimizer is None else f"{optimizer.name!r}, which is not built"
        raise ValueError(f"`slots=True` needs an optimizer that is built. Received: {received}.")
    variables = [v for v in optimizer.variables if _is_averaged(v)]
    return [v for v in variables if len(v.shape) > 0 or owner_of(v, model) is not None]


# -- messages -----------------------------------------------------------------------------------------


def _require_match(matches: list[bool], received: str, paths: list[str]) -> None:
    if not any(matches):
        raise ValueError(
            "`patterns` must match at least one of the variables chosen. "
            f"Received: {received}, which matches none of {paths}."
        )


def _name_of(function) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
