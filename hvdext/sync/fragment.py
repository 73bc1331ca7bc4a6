"""A fragment: the pieces of variables that travel together, seen as one flat vector."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from hvdext.sync.rule import Mean, Outer, Pull
from hvdext.sync.what import Piece


class Fragment:
    """Reads its pieces, and writes what a rule makes of them and the ranks' mean.

    Args:
        pieces: at least one.
        rule: `Mean`, `Pull` or `Outer`.
        keeps_centre: whether the values that all ranks have in common are kept, as the rule or the wire
            needs it.

    Attributes:
        size: elements.
        dtype: of the vector: float64 where a piece is, else float32.
        centre: None, or one variable per piece.
    """

    def __init__(self, pieces: Sequence[Piece], rule: Mean | Pull | Outer, keeps_centre: bool):
        self.pieces = list(pieces)
        self.sizes = [piece.size for piece in pieces]
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
            self.outer.build([variable for _, variable in self._stepped()])
        self.snapshot = graph_of(self.read)
        self.merge = graph_of(self._merge)
        self.after = graph_of(self._after)
        self.add = graph_of(lambda change: self._write(self.read() + change))
        self.put = graph_of(self._write)

    def read(self) -> tf.Tensor:
        """The pieces' values, of shape (size,)."""
        return tf.concat([_values(piece, self.dtype) for piece in self.pieces], 0)

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

    def _merged(self, now, start, own, mean, takes_mean):
        rule = self._rule
        if isinstance(rule, Outer):
            return self._after_outer(now, start, mean, takes_mean)
        target = mean
        if self.centre is not None:  # displacements have travelled
            centre = self.read_centre()
            own, target = start, centre + mean
            moved = target
            if isinstance(rule, Pull) and rule.centre_rate is not None:
                moved = centre + tf.constant(rule.centre_rate, self.dtype) * mean
                target = centre
            self.set_centre(moved)
        merged = now + rule.correction(own, target)
        # Where nothing has changed since the start, the mean itself: all ranks' bits are then equal.
        if isinstance(rule, Mean):
            untouched = tf.reduce_all(tf.equal(now, own))
            takes_mean = tf.logical_or(takes_mean, untouched)
        return tf.where(takes_mean, target, merged)

    def _after_outer(self, now, start, mean, takes_mean):
        assert isinstance(self._rule, Outer)
        centre = self.read_centre()
        target = centre + mean
        moves = self._cut(target)
        for variable, part in zip(self._centre(), moves, strict=True):
            if not any(variable is stepped for _, stepped in self._stepped()):
                variable.assign(part)
        if self.outer is not None:
            parts = self._cut(-mean)
            self.outer.apply([parts[i] for i, _ in self._stepped()], [v for _, v in self._stepped()])
        after = self.read_centre()
        alpha = tf.constant(self._rule.alpha, self.dtype)
        stepped = alpha * now + (1 - alpha) * after
        averaged = now + (target - start)
        averaged = tf.where(tf.reduce_all(tf.equal(now, start)), target, averaged)
        mask = self._trainable_mask()
        stepped = tf.where(tf.equal(alpha, 0), after, stepped)
        return tf.where(takes_mean, after, tf.where(mask, stepped, averaged))

    def _trainable_mask(self):
        flags = [piece.kind == "trainable" for piece in self.pieces]
        return tf.repeat(tf.constant(flags), tf.constant(self.sizes))

    def _stepped(self):
        """(place, centre variable) of the pieces that an outer optimizer steps."""
        return [(i, v) for i, v in enumerate(self._centre()) if self.pieces[i].kind == "trainable"]

    def _centre(self):
        assert self.centre is not None
        return self.centre

    def _cut(self, vector):
        parts = tf.split(vector, self.sizes)
        return [tf.reshape(part, piece.shape) for part, piece in zip(parts, self.pieces, strict=True)]

    def _write(self, vector):
        for piece, part in zip(self.pieces, tf.split(vector, self.sizes), strict=True):
            variable = piece.variable
            part = tf.cast(part, variable.dtype)
            if piece.start is not None:
                flat = tf.reshape(tf.convert_to_tensor(variable), [-1])
                part = tf.concat([flat[: piece.start], part, flat[piece.stop :]], 0)
            variable.assign(tf.reshape(part, variable.shape))


def graph_of(function: Callable) -> Callable:
    """`function` as a graph.

    A partial function of its own each time: TensorFlow counts how often a function is traced by its code, and
    warns where many fragments are traced once each.
    """
    return tf.function(functools.partial(function), autograph=False)


def _values(piece, dtype):
    flat = tf.reshape(tf.convert_to_tensor(piece.variable), [-1])
    if piece.start is not None:
        flat = flat[piece.start : piece.stop]
    return tf.cast(flat, dtype)
