"""A fragment: the pieces of variables that travel together, seen as one flat vector."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from hvdext.sync.pieces import Piece
from hvdext.sync.rule import Mean, Outer, Rule


class Fragment:
    """Reads its pieces, and writes what a rule makes of them and the ranks' mean.

    Args:
        pieces: at least one.
        rule: one of `sync/rule.py`, for the ranks that take part.
        keeps_centre: whether the values that all ranks have in common are kept, as the rule or the wire
            needs it.

    Attributes:
        pieces: in the order in which they lie in the vector: those of one variable together.
        sizes: elements of each piece.
        size: elements of all.
        dtype: of the vector: float64 where a piece is, else float32.
        centre: None, or one variable for the pieces of each variable.
    """

    def __init__(self, pieces: Sequence[Piece], rule: Rule, keeps_centre: bool):
        self._shares = _shares(pieces)
        self.pieces = [piece for share in self._shares for piece in share.pieces]
        self.sizes = [piece.size for piece in self.pieces]
        self.size = sum(self.sizes)
        wide = any(tf.as_dtype(piece.variable.dtype) == tf.float64 for piece in pieces)
        self.dtype = tf.float64 if wide else tf.float32
        self._rule = rule
        self.outer: keras.optimizers.Optimizer | None = None
        self.centre: list[keras.Variable] | None = None
        if keeps_centre:
            self.centre = [
                keras.Variable(part, dtype=self.dtype.name, name=f"centre_{i}")
                for i, part in enumerate(self._cut(self.read()))
            ]
        if isinstance(rule, Outer) and self._stepped():
            self.outer = rule.new_optimizer()
            self.outer.build(list(self._stepped().values()))
        self.snapshot = Traced(self.read)
        self.merge = Traced(self._merge)
        self.after = Traced(self._after)
        self.add = Traced(lambda change: self._write(self.read() + change))
        self.put = Traced(self._write)

    def read(self) -> tf.Tensor:
        """The pieces' values, of shape (size,)."""
        return tf.concat([part for share in self._shares for part in share.read(self.dtype)], 0)

    def set_centre(self, vector: tf.Tensor) -> None:
        """Gives the centre other values, of shape (size,)."""
        for variable, part in zip(self._centre(), self._cut(vector), strict=True):
            variable.assign(part)

    def read_centre(self) -> tf.Tensor:
        """The centre's values, of shape (size,)."""
        return tf.concat([tf.reshape(v.value, [-1]) for v in self._centre()], 0)

    def labels_of(self, where: np.ndarray) -> list[str]:
        """The pieces in which any element of `where`, bool of shape (size,), is true."""
        parts = np.split(where, np.cumsum(self.sizes)[:-1])
        return [piece.label for piece, part in zip(self.pieces, parts, strict=True) if part.any()]

    def sums(self, vector: tf.Tensor) -> tf.Tensor:
        """The sum over each piece of `vector`: shape (size,) to (number of pieces,)."""
        return tf.stack([tf.reduce_sum(part) for part in tf.split(vector, self.sizes)])

    def outgoing(self, start: tf.Tensor) -> tf.Tensor:
        """What travels: the values, or where there is a centre how far they are from it."""
        return start if self.centre is None else start - self.read_centre()

    def target(self, mean: tf.Tensor) -> tf.Tensor:
        """The values whose `outgoing` is `mean`."""
        return mean if self.centre is None else self.read_centre() + mean

    def _merge(self, start, own, mean, takes_mean):
        """Without anything in between: training has waited, or starts again from here.

        Args:
            start: the values when the exchange started.
            own: without a centre, the same as they arrived at others.
            mean: the ranks' mean; where there is a centre, of the displacements from it.
            takes_mean: bool; True where this rank's own values are of no use.
        """
        self._write(self._merged(self.read(), start, own, mean, takes_mean))

    def _after(self, start, own, mean, takes_mean):
        """What `_merge` would make of the values if they were still `start`; moves the centre."""
        return self._merged(start, start, own, mean, takes_mean)

    def _merged(self, x, start, own, mean, takes_mean):
        """What the rule makes of the values `x`; the formulas and their symbols stand in `sync/rule.py`."""
        rule = self._rule
        if self.centre is None:
            target, merged = mean, rule.merged(x, own, mean)
        elif isinstance(rule, Outer):
            target, merged = self._merged_by_outer(rule, x, start, mean)
        else:
            target, centre = rule.centred(self.read_centre(), mean)
            self.set_centre(centre)
            merged = rule.merged(x, start, target)
        return tf.where(takes_mean, target, merged)

    def _merged_by_outer(self, rule, x, start, displacement):
        """Trainable shares by the outer optimizer, which steps the centre itself; others as by `Mean`."""
        before = self.read_centre()
        mean, moved = Mean().centred(before, displacement)
        stepped = self._stepped()
        for i, (variable, part) in enumerate(zip(self._centre(), self._cut(moved), strict=True)):
            if i not in stepped:
                variable.assign(part)
        if self.outer is not None:
            gradients = self._cut(rule.gradient(displacement))
            self.outer.apply([gradients[i] for i in stepped], list(stepped.values()))
        target = rule.target(before, self.read_centre())
        merged = rule.merged(x, start, target)
        if len(stepped) < len(self._shares):
            merged = tf.where(self._trainable_mask(), merged, Mean().merged(x, start, mean))
        return target, merged

    def _trainable_mask(self):
        flags = [share.is_trainable for share in self._shares]
        return tf.repeat(tf.constant(flags), tf.constant([share.size for share in self._shares]))

    def _stepped(self):
        """The shares that an outer optimizer steps: their places and centre variables."""
        return {i: v for i, v in enumerate(self._centre()) if self._shares[i].is_trainable}

    def _centre(self):
        assert self.centre is not None
        return self.centre

    def _cut(self, vector):
        """The part of each share, in its shape."""
        parts = tf.split(vector, [share.size for share in self._shares])
        return [tf.reshape(part, share.shape) for part, share in zip(parts, self._shares, strict=True)]

    def _write(self, vector):
        for share, part in zip(self._shares, self._cut(vector), strict=True):
            share.write(part)


@dataclass(frozen=True)
class _Share:
    """What a fragment has of one variable: all of it, or ranges in the order of its elements."""

    variable: keras.Variable
    pieces: list[Piece]

    @property
    def size(self):
        return sum(piece.size for piece in self.pieces)

    @property
    def shape(self):
        return (self.size,) if self._is_cut else self.pieces[0].shape

    @property
    def is_trainable(self):
        return self.pieces[0].kind == "trainable"

    @property
    def _is_cut(self):
        return self.pieces[0].start is not None

    def read(self, dtype):
        flat = self._flat()
        parts = [flat[piece.start : piece.stop] for piece in self.pieces] if self._is_cut else [flat]
        return [tf.cast(part, dtype) for part in parts]

    def write(self, value):
        """One assignment, however many ranges there are."""
        value = tf.cast(value, self.variable.dtype)
        if self._is_cut:
            flat, rows = self._flat(), []
            end: int | None = 0
            parts = tf.split(value, [piece.size for piece in self.pieces])
            for piece, part in zip(self.pieces, parts, strict=True):
                rows += [flat[end : piece.start], part]
                end = piece.stop
            value = tf.reshape(tf.concat([*rows, flat[end:]], 0), self.variable.shape)
        self.variable.assign(value)

    def _flat(self):
        return tf.reshape(tf.convert_to_tensor(self.variable), [-1])


def _shares(pieces):
    found: dict[int, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.start or 0):
        found.setdefault(id(piece.variable), []).append(piece)
    return [
        _Share(found[key][0].variable, found[key]) for key in dict.fromkeys(id(p.variable) for p in pieces)
    ]


class Traced:
    """`function`, traced: a graph for arguments whose shapes and types never change.

    Traced at the first call and then called directly: finding out each time which trace fits the arguments
    takes Python longer than the rest of the call.
    """

    def __init__(self, function: Callable):
        # A partial function of its own each time: TensorFlow counts how often a function is traced by its
        # code, and warns where many fragments are traced once each.
        self._function = tf.function(functools.partial(function), autograph=False)
        self._traced: Callable | None = None

    def __call__(self, *args: tf.Tensor):
        """What `function` returns, as tensors."""
        if self._traced is None:
            self._traced = self._function.get_concrete_function(*args)
        return self._traced(*args)
