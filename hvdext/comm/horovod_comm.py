"""The communicator behind which Horovod's engine stands. The only one that exchanges data through it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.ledger import Ledger
from hvdext.comm.one_message import allreduce_as_one
from hvdext.comm.wire_types import is_exact, scaled


def _in_a_graph(collective: Callable) -> Callable:
    """Eager operations of the engine ignore their names: called eagerly, `collective` runs in a graph."""

    @functools.wraps(collective)
    def call(self, tensors, name, *settings):
        if not tf.executing_eagerly():
            return collective(self, tensors, name, *settings)
        key = (collective.__name__, name, *settings)
        with self._functions_lock:
            if key not in self._functions:
                # Not a lambda: TensorFlow counts, and warns of, the traces of all that share one's code.
                function = functools.partial(_call, collective, self, name, settings)
                self._functions[key] = tf.function(function, reduce_retracing=True, autograph=False)
        return self._functions[key](tensors)

    return call


def _call(collective, comm, name, settings, tensors):
    return collective(comm, tensors, name, *settings)


class HorovodComm(Communicator):
    """The ranks that a launcher started, joined by Horovod.

    Make it once per process, after `horovod.tensorflow.init()`; `hvdext.init()` does both.
    """

    def __init__(self, ranks: Sequence[int] | None = None, ledger: Ledger | None = None):
        from horovod.common import process_sets as engine_sets
        from horovod.tensorflow import mpi_ops

        self._ops = mpi_ops
        if ranks is None:
            self._engine_set = engine_sets.global_process_set
            ranks = range(mpi_ops.size())
        else:
            # A rank on its own exchanges nothing, so that its set needs no registration.
            self._engine_set = None if len(ranks) == 1 else _engine_set(ranks, mpi_ops, engine_sets)
        ranks = tuple(ranks)
        super().__init__(ranks.index(mpi_ops.rank()), ranks, ledger or Ledger(len(ranks)))
        self._subsets: dict[tuple[int, ...], HorovodComm] = {}
        self._functions: dict[tuple, Callable] = {}
        self._functions_lock = threading.Lock()

    def registered_sets(self) -> dict[tuple[int, ...], int]:
        """As in `Communicator`."""
        known = super().registered_sets()
        try:
            numbers = self._ops._basics._get_process_set_ids_and_ranks()
        except ValueError:  # a rank has left, and with it the engine
            return known
        return known | {tuple(sorted(ranks)): number for number, ranks in numbers.items()}

    def forget(self, ranks: tuple[int, ...]) -> None:
        """The set of these ranks is registered no more: the engine's number may be another set's soon."""
        self._subsets.pop(ranks, None)

    def _subset(self, ranks):
        if ranks not in self._subsets:
            self._subsets[ranks] = HorovodComm(ranks, self.ledger)
        return self._subsets[ranks]

    @_in_a_graph
    def _allreduce(self, tensors, name, prescale, postscale, op):
        inside = is_exact(tensors[0], prescale, postscale)
        totals = allreduce_as_one(
            self._ops,
            tensors if inside else [scaled(tensor, prescale) for tensor in tensors],
            name,
            reduce_op=getattr(self._ops, op.capitalize()),
            prescale_factor=prescale if inside else 1.0,
            postscale_factor=postscale if inside else 1.0,
            process_set_id=self._engine_set.process_set_id,
        )
        return totals if inside else [scaled(total, postscale) for total in totals]

    @_in_a_graph
    def _reducescatter(self, tensor, name, prescale, postscale):
        inside = is_exact(tensor, prescale, postscale)
        total = self._ops._reducescatter(
            tensor if inside else scaled(tensor, prescale),
            name=name,
            op=self._ops.Sum,
            ignore_name_scope=True,
            process_set=self._engine_set,
            prescale_factor=prescale if inside else 1.0,
            postscale_factor=postscale if inside else 1.0,
        )
        return total if inside else scaled(total, postscale)

    @_in_a_graph
    def _allgather(self, tensor, name):
        return self._ops.allgather(tensor, name=name, ignore_name_scope=True, process_set=self._engine_set)

    @_in_a_graph
    def _alltoall(self, tensors, name):
        tensor, splits = tensors
        received, _ = self._ops.alltoall(
            tensor, splits=splits, name=name, ignore_name_scope=True, process_set=self._engine_set
        )
        return received

    @_in_a_graph
    def _broadcast(self, tensors, name, root):
        return [
            self._ops.broadcast(
                tensor,
                self.ranks[root],
                name=f"{name}.{i}",
                ignore_name_scope=True,
                process_set=self._engine_set,
            )
            for i, tensor in enumerate(tensors)
        ]

    def _join(self):
        # Eagerly: of an operation without inputs TensorFlow may keep the first result of a graph.
        return int(self._ops.join())


def _engine_set(members, mpi_ops, engine_sets):
    """Horovod's own object for the set with these ranks; it must have been registered."""
    known = mpi_ops._basics._get_process_set_ids_and_ranks()
    for number, ranks in known.items():
        if sorted(ranks) == sorted(members):
            return engine_sets._temp_process_set_object(number)
    raise ValueError(
        "`process_set` must be registered: pass it to `hvd.init(process_sets=[...])` or to "
        f"`hvd.add_process_set()`. Received: ProcessSet({list(members)}); "
        f"registered: {sorted(known.values())}."
    )
