"""How ranks talk: one interface, with Horovod behind it or nobody at all.

Everyone else in hvdext holds a `Communicator` and never exchanges data in another way. There are three:
`HorovodComm` (processes started by a launcher), `SoloComm` (one process; Horovod is not needed) and
`hvdext.testing.ThreadComm` (ranks as threads of one process, for tests).

Rules every caller keeps:

1. Each collective has an explicit name, `hvdext.<purpose>[.<detail>]`, that is the same on all ranks.
   Names made by a graph differ between ranks with different graphs, and then nobody ever meets.
2. Whether to call a collective depends on the step and the settings only: never on a local value, a
   local exception or how much data one rank has.
"""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow as tf

from hvdext.comm.ledger import Ledger, Traffic, Unmarked
from hvdext.comm.pickling import check_pickled, pickled, unpickled
from hvdext.comm.wire_types import bytes_of, movable, moved, scaled, scattered_in, summed_in
from hvdext.keras_tools.xla import refuse_xla

_NAME = re.compile(r"hvdext(\.[A-Za-z0-9_-]+)+")

_OPS = ("sum", "min", "max", "product")


class Communicator(abc.ABC):
    """A group of ranks that exchange tensors and objects.

    Attributes:
        rank: this rank's place within the group, 0 to size - 1.
        size: how many ranks the group has.
        ranks: the members' global ranks, in the group's order.
        ledger: calls, bytes and waiting collectives of this process.
    """

    def __init__(self, rank: int, ranks: Sequence[int], ledger: Ledger):
        self.rank = rank
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.ledger = ledger

    # -- tensors: in a tf.function or eagerly, on every rank of the group, under the same name --------

    def allreduce(
        self,
        tensors: Sequence[tf.Tensor],
        name: str,
        *,
        prescale: float = 1.0,
        postscale: float = 1.0,
        op: str = "sum",
    ) -> list[tf.Tensor]:
        """Combines each of `tensors` over the ranks element by element, as one fused message.

        Args:
            tensors: tensors of one dtype; the same shapes on every rank.
            name: the collective's name, the same on every rank.
            prescale: with "sum", each rank's tensors are multiplied by it before the sum.
            postscale: with "sum", the sum is multiplied by it.
            op: "sum", "min", "max" or "product".

        Returns:
            `postscale * sum over ranks of prescale * tensor`, or the ranks' smallest, largest or multiplied
            values; bit for bit the same on every rank.
        """
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        if op != "sum":
            _check_op(op, prescale, postscale)
            return tensors if self.size == 1 else self._run(self._run_allreduce, tensors, name, op=op)
        if self.size == 1:
            return [scaled(tensor, prescale * postscale) for tensor in tensors]
        return self._run(
            self._run_allreduce, tensors, name, prescale=float(prescale), postscale=float(postscale)
        )

    def reducescatter(
        self, tensor: tf.Tensor, name: str, *, prescale: float = 1.0, postscale: float = 1.0
    ) -> tf.Tensor:
        """Sums `tensor` over the ranks; each rank gets its block of the sum's rows.

        Args:
            tensor: at least one axis; the same shape and dtype on every rank.
            name: the collective's name, the same on every rank.
            prescale: each rank's tensor is multiplied by it before the sum.
            postscale: the sum is multiplied by it.

        Returns:
            This rank's rows, the blocks in rank order. Where the ranks do not divide the rows, the first
            ranks get one row more than the others.
        """
        tensor = tf.convert_to_tensor(tensor)
        if self.size == 1:
            return scaled(tensor, prescale * postscale)
        return self._run(
            self._run_reducescatter, [tensor], name, prescale=float(prescale), postscale=float(postscale)
        )[0]

    def allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Concatenates the ranks' tensors along axis 0, in rank order.

        Args:
            tensor: any dtype, at least one axis; ranks may differ in the length of axis 0 only.
            name: the collective's name, the same on every rank.
        """
        tensor = tf.convert_to_tensor(tensor)
        if self.size == 1:
            return tf.identity(tensor)
        return self._run(self._run_allgather, [tensor], name)[0]

    def alltoall(self, tensor: tf.Tensor, splits: Sequence[int] | tf.Tensor, name: str) -> tf.Tensor:
        """Sends `splits[r]` rows of `tensor` to rank r; returns the received rows in rank order.

        Args:
            tensor: any dtype; rows are counted along axis 0.
            splits: int32, shape (size,): rows for each rank, in rank order; their sum is the number
                of rows.
            name: the collective's name, the same on every rank.
        """
        tensor, splits = tf.convert_to_tensor(tensor), tf.cast(splits, tf.int32)
        if self.size == 1:
            return tf.identity(tensor)
        return self._run(self._run_alltoall, [tensor, splits], name)[0]

    def broadcast(self, tensors: Sequence[tf.Tensor], root: int, name: str) -> list[tf.Tensor]:
        """Returns rank `root`'s tensors on every rank.

        Args:
            tensors: any dtypes; the same shapes and dtypes on every rank.
            root: the sender, as a rank of this group.
            name: the collective's name, the same on every rank.
        """
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        if self.size == 1:
            return tensors
        return self._run(self._run_broadcast, tensors, name, root=root)

    # -- objects: eagerly, on every rank of the group --------------------------------------------------
    # What does not pickle travels as a word about it: the others wait for this rank.

    def allgather_object(self, value: Any, name: str) -> list:
        """Returns every rank's `value` (anything that cloudpickle can pickle), in rank order.

        Raises:
            ValueError: on every rank alike, if a rank's `value` does not pickle.
        """
        if self.size == 1:
            return [value]
        values = unpickled(self.allgather(tf.constant(pickled(value)), name).numpy())
        check_pickled(dict(zip(self.ranks, values, strict=True)))
        return values

    def broadcast_object(self, value: Any, root: int, name: str) -> Any:
        """Returns rank `root`'s `value` on every rank; what the others pass is ignored.

        Raises:
            ValueError: on every rank alike, if the root's `value` does not pickle.
        """
        if self.size == 1:
            return value
        payload = pickled(value) if self.rank == root else np.zeros(0, np.uint8)
        (length,) = self.broadcast([tf.constant(payload.size, tf.int64)], root, f"{name}.size")
        if self.rank != root:
            payload = np.zeros(int(length), np.uint8)
        (payload,) = self.broadcast([tf.constant(payload)], root, name)
        (received,) = unpickled(payload.numpy())
        check_pickled({self.ranks[root]: received})
        return received

    def barrier(self, name: str) -> None:
        """Returns once every rank of the group has called it."""
        self.allgather(tf.zeros([1], tf.uint8), name)

    def join(self, name: str) -> int:
        """Waits, eagerly, until every rank has called it; meanwhile adds zeros to the others' sums.

        Args:
            name: what the ledger and the watchdog call it.

        Returns:
            The global rank that came last.
        """
        if self.size == 1:
            return self.ranks[0]
        entry = self._entry(name)
        with tf.init_scope():
            entry.start([])
            last = self._join()
            entry.finish([], 0)
        return last

    # -- the group -----------------------------------------------------------------------------------

    def subset(self, ranks: Sequence[int]) -> Communicator:
        """The communicator of some of the ranks, this rank among them.

        Args:
            ranks: global ranks, in the order of their places in the new group.

        Raises:
            ValueError: if this rank is not among them, or the engine does not know their set.
        """
        ranks = tuple(ranks)
        me = self.ranks[self.rank]
        if me not in ranks:
            raise ValueError(
                "`process_set` must contain the rank that uses it. "
                f"Received: ProcessSet({list(ranks)}) on rank {me}."
            )
        return self if ranks == self.ranks else self._subset(ranks)

    @abc.abstractmethod
    def _subset(self, ranks: tuple[int, ...]) -> Communicator:
        """What `subset` returns for other ranks than this group's."""

    def registered_sets(self) -> dict[tuple[int, ...], int]:
        """Maps the ranks of each set that the engine knows to its number of it; 0 are all ranks."""
        return {self.ranks: 0}

    def traffic(self) -> dict[str, Traffic]:
        """Calls and bytes so far by purpose: `{"grad": Traffic(calls=4, bytes=...), ...}`."""
        return self.ledger.traffic()

    # -- what an implementation with more than one rank provides ---------------------------------------

    def _allreduce(
        self, tensors: list[tf.Tensor], name: str, prescale: float, postscale: float, op: str
    ) -> list[tf.Tensor]:
        raise NotImplementedError

    def _reducescatter(self, tensor: tf.Tensor, name: str, prescale: float, postscale: float) -> tf.Tensor:
        raise NotImplementedError

    def _allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        raise NotImplementedError

    def _alltoall(self, tensors: list[tf.Tensor], name: str) -> tf.Tensor:
        raise NotImplementedError

    def _broadcast(self, tensors: list[tf.Tensor], name: str, root: int) -> list[tf.Tensor]:
        raise NotImplementedError

    def _join(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} cannot join: only Horovod's engine can.")

    # -- one collective: types that travel, marks in the ledger, and the call itself ------------------

    def _run_allreduce(self, tensors, name, prescale=1.0, postscale=1.0, op="sum"):
        dtype = tensors[0].dtype
        wire = summed_in(dtype)
        tensors = [tf.cast(tensor, wire) for tensor in tensors]
        entry = self._entry(name)
        tensors = entry.start(tensors)
        results = self._allreduce(tensors, name, prescale, postscale, op)
        entry.finish(results, sum(map(bytes_of, tensors)) * 2 * (self.size - 1) // self.size)
        return [tf.cast(result, dtype) for result in results]

    def _run_reducescatter(self, tensors, name, prescale, postscale):
        dtype = tensors[0].dtype
        wire = scattered_in(dtype)
        entry = self._entry(name)
        (tensor,) = entry.start([tf.cast(tensors[0], wire)])
        result = self._reducescatter(tensor, name, prescale, postscale)
        entry.finish([result], bytes_of(tensor) * (self.size - 1) // self.size)
        return [tf.cast(result, dtype)]

    def _run_allgather(self, tensors, name):
        entry = self._entry(name)
        (tensor,) = entry.start([movable(tensors[0])])
        result = self._allgather(tensor, name)
        entry.finish([result], bytes_of(tensor) * (self.size - 1))
        return [moved(result, tensors[0].dtype)]

    def _run_alltoall(self, tensors, name):
        entry = self._entry(name)
        tensor, splits = entry.start([movable(tensors[0]), tensors[1]])
        result = self._alltoall([tensor, splits], name)
        rows = tf.cast(tf.reduce_sum(splits), tf.int64)
        away = rows - tf.cast(splits[self.rank], tf.int64)
        entry.finish([result], bytes_of(tensor) * away // tf.maximum(rows, 1))
        return [moved(result, tensors[0].dtype)]

    def _run_broadcast(self, tensors, name, root):
        entry = self._entry(name)
        started = entry.start([movable(tensor) for tensor in tensors])
        results = self._broadcast(started, name, root)
        # A binomial tree: the root sends to log2(size) others, who pass it on.
        sends = math.ceil(math.log2(self.size)) if self.rank == root else 0
        entry.finish(results, sum(map(bytes_of, started)) * sends)
        results = [moved(r, t.dtype) for r, t in zip(results, tensors, strict=True)]
        for result, tensor in zip(results, tensors, strict=True):
            result.set_shape(tensor.shape)
        return results

    def _entry(self, name):
        """The ledger's entry for this group, whose variables no function being traced may claim as its own.

        A function that has made variables is traced a second time, and may make none when it is traced for
        other arguments. TensorFlow knows which function by the thread.
        """
        if not tf.compat.v1.executing_eagerly_outside_functions():
            return Unmarked()
        entry = self.ledger.known(name, self.ranks)
        if entry is not None:
            return entry
        with futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(self.ledger.entry, name, self.ranks).result()

    def _run(self, method: Callable, tensors: list[tf.Tensor], name: str, **options) -> list[tf.Tensor]:
        """Calls `method`.

        Called eagerly, the collective shows as one span of its name in TensorBoard's profile; within a graph
        its operations do.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"`name` must look like 'hvdext.<purpose>.<detail>'. Received: name={name!r}.")
        if not tf.executing_eagerly():
            refuse_xla(name)
            return method(tensors, name=name, **options)
        try:
            with tf.profiler.experimental.Trace(name):
                return method(tensors, name=name, **options)
        except tf.errors.OpError:
            self._entry(name).give_up()
            raise


class SoloComm(Communicator):
    """One process on its own: every exchange gives back what went in."""

    def __init__(self) -> None:
        super().__init__(rank=0, ranks=[0], ledger=Ledger(1))

    def _subset(self, ranks: tuple[int, ...]) -> Communicator:
        return self


def _check_op(op, prescale, postscale):
    if op not in _OPS:
        raise ValueError(f"`op` must be one of {_OPS}. Received: op={op!r}.")
    if prescale != 1.0 or postscale != 1.0:
        raise ValueError(
            f"`prescale` and `postscale` need op='sum'. Received: {prescale} and {postscale} with op={op!r}."
        )
