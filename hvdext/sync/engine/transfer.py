"""One fragment's exchange: what every rank brings, and what every rank takes home.

All ranks tell each other how much they count and whether their values are finite. The values of a rank that
has any that are not finite stay at home.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.sync.engine.averaging import error_shapes, mean_over_all, mean_with_peers
from hvdext.sync.engine.fragment import Fragment, Traced
from hvdext.sync.engine.report import FINITE, WEIGHT, Report
from hvdext.sync.whom import Turn, Whom
from hvdext.sync.wire import Wire


@dataclass
class Outcome:
    """What an exchange has brought.

    Attributes:
        own: what this rank has sent, as it arrived at others, of shape (size,).
        mean: the mean of what those that met have sent, of shape (size,).
        table: float64 of shape (ranks, 6): the rows of all ranks' reports.
        ranks: the global ranks of the table's rows.
        place: this rank's row.
        seconds: how long the exchange took.
        squares: None, or float64 of shape (ranks, pieces): each rank's squared distance to the mean by
            piece; measured on request only.
        mean_square: None, or the squared norm of the mean.
    """

    own: tf.Tensor
    mean: tf.Tensor
    table: np.ndarray
    ranks: tuple[int, ...]
    place: int
    seconds: float
    squares: np.ndarray | None = None
    mean_square: float | None = None

    @property
    def takes_mean(self) -> bool:
        """True if this rank's own values are not finite."""
        return not self.table[self.place, FINITE]

    @property
    def failing(self) -> list[int]:
        """The global ranks whose values are not finite."""
        return [rank for rank, row in zip(self.ranks, self.table, strict=True) if not row[FINITE]]


class Transfer:
    """The exchanges of one fragment.

    Args:
        name: of its collectives, "hvdext.sync...".
        fragment: whose values travel.
        wire: how they travel.
        comm: the ranks among which `whom` chooses.
        whom: with whom they are exchanged.
        measures: whether distances and norms are exchanged besides.
    """

    def __init__(
        self, name: str, fragment: Fragment, wire: Wire, comm: Communicator, whom: Whom, measures: bool
    ):
        self._name = name
        self._fragment = fragment
        self._wire = wire
        self._comm = comm
        self._whom = whom
        self._measures = measures
        self._functions: dict[tuple, Callable] = {}
        self.errors: list[tf.Variable] = []  # what the wire has cut off so far, with error feedback
        size = whom.turn(comm, 0).comm.size
        if wire.rounding == "error_feedback" and size > 1:
            shapes = error_shapes(size, fragment.size, wire)
            self.errors = [tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes]

    def run(self, start: tf.Tensor, number: int, report: Report) -> Outcome:
        """Exchanges the fragment's values; every rank that meets in this turn must call it.

        Args:
            start: the values, of shape (fragment.size,).
            number: of the fragment's turn, the same on all ranks.
            report: what this rank tells the others of itself.
        """
        with tf.profiler.experimental.Trace("hvdext.sync.transfer", fragment=self._name, turn=number):
            return self._run(start, number, report)

    def _run(self, start, number, report):
        begin = time.perf_counter()
        turn = self._whom.turn(self._comm, number)
        seed = np.array([number, turn.comm.ranks[turn.comm.rank]], np.int32)
        sends, receives = _flags(turn, turn.send_to), _flags(turn, turn.receive_from)
        results = self._function(turn)(start, tf.constant(report.row()), tf.constant(seed), sends, receives)
        own, mean, table, squares, mean_square = results
        outcome = Outcome(
            own, mean, table.numpy(), turn.comm.ranks, turn.comm.rank, time.perf_counter() - begin
        )
        if self._measures:
            outcome.squares, outcome.mean_square = squares.numpy(), float(mean_square)
        return outcome

    def _function(self, turn: Turn):
        key = (turn.comm.ranks, turn.send_to is None, len(turn.send_to or ()))
        if key not in self._functions:
            self._functions[key] = Traced(functools.partial(self._exchange, turn.comm, key[1], key[2]))
        return self._functions[key]

    def _exchange(self, comm, everyone, peers, start, row, seed, sends, receives):
        values = self._fragment.outgoing(start)
        finite = tf.reduce_all(tf.math.is_finite(values))
        row = tf.tensor_scatter_nd_update(row, [[FINITE]], [tf.cast(finite, tf.float64)])
        brought, values = values, tf.where(finite, values, tf.zeros_like(values))
        name = f"{self._name}.values"
        if everyone:
            errors = tuple(self.errors) or None
            mean, after, table = mean_over_all(comm, values, row, _weights, self._wire, name, seed, errors)
            own = values
            helped = tf.reduce_any(_weights(table) > 0)
            for variable, error in zip(self.errors, after or (), strict=True):
                variable.assign(error)
        else:
            table = comm.allgather(row[tf.newaxis], f"{self._name}.told")
            weights = _weights(table)
            own, mean = mean_with_peers(comm, values, weights, sends, receives, self._wire, name, seed, peers)
            helped = tf.reduce_any((receives > 0) & (weights > 0))
        # Values that are not finite stay so, to be seen, where nobody who meets has any to help out with.
        mean = tf.where(finite | helped, mean, brought)
        if not self._measures:
            nothing = tf.constant(0.0, tf.float64)
            return own, mean, table, nothing, nothing
        distances = self._fragment.sums(tf.square(tf.cast(values - mean, tf.float64)))
        squares = comm.allgather(distances[tf.newaxis], f"{self._name}.squares")
        return own, mean, table, squares, tf.reduce_sum(tf.square(tf.cast(mean, tf.float64)))


def _weights(table):
    """How much each rank counts: not at all where its values are not finite."""
    finite = table[:, FINITE]
    weights = table[:, WEIGHT] * finite
    return tf.where(tf.reduce_sum(weights) > 0, weights, finite)


def _flags(turn: Turn, places: Sequence[int] | None) -> tf.Tensor:
    """int32 of shape (ranks,), 1 at `places`."""
    flags = np.zeros(turn.comm.size, np.int32)
    flags[list(places or ())] = 1
    return tf.constant(flags)
