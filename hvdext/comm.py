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
import functools
import math
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import cloudpickle
import numpy as np
import tensorflow as tf

from hvdext.ledger import Ledger, Traffic
from hvdext.process_sets import ProcessSet

_NAME = re.compile(r"hvdext(\.[A-Za-z0-9_-]+)+")

# What the engine reduces as it is. Others travel in the nearest type that holds them.
_REDUCIBLE = {tf.uint8, tf.int8, tf.int32, tf.int64, tf.float16, tf.float32, tf.float64}
_WIDER = {
    tf.bfloat16: tf.float32,
    tf.bool: tf.int32,
    tf.int16: tf.int32,
    tf.uint16: tf.int32,
    tf.uint32: tf.int64,
}
_MOVABLE = _REDUCIBLE | {tf.int16, tf.uint16, tf.bool}
# The engine's reducescatter knows two types less.
_SCATTERS_WIDER = _WIDER | {tf.uint8: tf.int32, tf.int8: tf.int32}
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
        self._functions: dict[tuple, Callable] = {}
        self._functions_lock = threading.Lock()

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
            return tensors if self.size == 1 else self._run("_reduce", tensors, name, op=op)
        if self.size == 1:
            return [_scaled(tensor, prescale * postscale) for tensor in tensors]
        return self._run("_reduce", tensors, name, prescale=float(prescale), postscale=float(postscale))

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
            return _scaled(tensor, prescale * postscale)
        return self._run("_scatter", [tensor], name, prescale=float(prescale), postscale=float(postscale))[0]

    def allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Concatenates the ranks' tensors along axis 0, in rank order.

        Args:
            tensor: any dtype, at least one axis; ranks may differ in the length of axis 0 only.
            name: the collective's name, the same on every rank.
        """
        tensor = tf.convert_to_tensor(tensor)
        if self.size == 1:
            return tf.identity(tensor)
        return self._run("_gather", [tensor], name)[0]

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
        return self._run("_exchange", [tensor, splits], name)[0]

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
        return self._run("_spread", tensors, name, root=root)

    # -- objects: eagerly, on every rank of the group --------------------------------------------------
    # What does not pickle travels as a word about it: the others wait for this rank.

    def allgather_object(self, value: Any, name: str) -> list:
        """Returns every rank's `value` (anything that cloudpickle can pickle), in rank order.

        Raises:
            ValueError: on every rank alike, if a rank's `value` does not pickle.
        """
        if self.size == 1:
            return [value]
        payload = tf.constant(_pickled(value))
        sizes = self.allgather(tf.shape(payload, tf.int64), f"{name}.size").numpy()
        parts = np.split(self.allgather(payload, name).numpy(), np.cumsum(sizes)[:-1])
        values = [_unpickled(part) for part in parts]
        _check_pickled(dict(zip(self.ranks, values, strict=True)))
        return values

    def broadcast_object(self, value: Any, root: int, name: str) -> Any:
        """Returns rank `root`'s `value` on every rank; what the others pass is ignored.

        Raises:
            ValueError: on every rank alike, if the root's `value` does not pickle.
        """
        if self.size == 1:
            return value
        payload = _pickled(value) if self.rank == root else np.zeros(0, np.uint8)
        (length,) = self.broadcast([tf.constant(payload.size, tf.int64)], root, f"{name}.size")
        if self.rank != root:
            payload = np.zeros(int(length), np.uint8)
        (payload,) = self.broadcast([tf.constant(payload)], root, name)
        received = _unpickled(payload.numpy())
        _check_pickled({self.ranks[root]: received})
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

    @abc.abstractmethod
    def subset(self, process_set: ProcessSet) -> Communicator:
        """The communicator of the ranks in `process_set`, this rank among them."""

    def traffic(self) -> dict[str, Traffic]:
        """Calls and bytes so far by purpose: `{"grad": Traffic(calls=4, bytes=...), ...}`."""
        return self.ledger.traffic()

    # -- what an implementation with more than one rank provides; called inside a graph ----------------

    def _allreduce(
        self, tensors: list[tf.Tensor], name: str, prescale: float, postscale: float, op: str
    ) -> list[tf.Tensor]:
        raise NotImplementedError

    def _reducescatter(self, tensor: tf.Tensor, name: str, prescale: float, postscale: float) -> tf.Tensor:
        raise NotImplementedError

    def _allgather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        raise NotImplementedError

    def _alltoall(self, tensor: tf.Tensor, splits: tf.Tensor, name: str) -> tf.Tensor:
        raise NotImplementedError

    def _broadcast(self, tensor: tf.Tensor, root: int, name: str) -> tf.Tensor:
        raise NotImplementedError

    def _join(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} cannot join: only Horovod's engine can.")

    # -- one collective: types that travel, marks in the ledger, and the call itself ------------------

    def _reduce(self, tensors, name, prescale=1.0, postscale=1.0, op="sum"):
        dtype = tensors[0].dtype
        wire = _wire(dtype, _WIDER)
        tensors = [tf.cast(tensor, wire) for tensor in tensors]
        entry = self._entry(name)
        tensors = entry.start(tensors)
        results = self._allreduce(tensors, name, prescale, postscale, op)
        entry.finish(results, sum(map(_bytes, tensors)) * 2 * (self.size - 1) // self.size)
        return [tf.cast(result, dtype) for result in results]

    def _scatter(self, tensors, name, prescale, postscale):
        dtype = tensors[0].dtype
        wire = _wire(dtype, _SCATTERS_WIDER)
        entry = self._entry(name)
        (tensor,) = entry.start([tf.cast(tensors[0], wire)])
        result = self._reducescatter(tensor, name, prescale, postscale)
        entry.finish([result], _bytes(tensor) * (self.size - 1) // self.size)
        return [tf.cast(result, dtype)]

    def _gather(self, tensors, name):
        entry = self._entry(name)
        (tensor,) = entry.start([_movable(tensors[0])])
        result = self._allgather(tensor, name)
        entry.finish([result], _bytes(tensor) * (self.size - 1))
        return [_moved(result, tensors[0].dtype)]

    def _exchange(self, tensors, name):
        entry = self._entry(name)
        tensor, splits = entry.start([_movable(tensors[0]), tensors[1]])
        result = self._alltoall(tensor, splits, name)
        rows = tf.cast(tf.reduce_sum(splits), tf.int64)
        away = rows - tf.cast(splits[self.rank], tf.int64)
        entry.finish([result], _bytes(tensor) * away // tf.maximum(rows, 1))
        return [_moved(result, tensors[0].dtype)]

    def _spread(self, tensors, name, root):
        entry = self._entry(name)
        started = entry.start([_movable(tensor) for tensor in tensors])
        results = [self._broadcast(tensor, root, f"{name}.{i}") for i, tensor in enumerate(started)]
        # A binomial tree: the root sends to log2(size) others, who pass it on.
        sends = math.ceil(math.log2(self.size)) if self.rank == root else 0
        entry.finish(results, sum(map(_bytes, started)) * sends)
        moved = [_moved(r, t.dtype) for r, t in zip(results, tensors, strict=True)]
        for result, tensor in zip(moved, tensors, strict=True):
            result.set_shape(tensor.shape)
        return moved

    def _entry(self, name):
        """The ledger's entry for this group, whose variables no function being traced may claim as its own.

        A function that has made variables is traced a second time, and may make none when it is traced for
        other arguments. TensorFlow knows which function by the thread.
        """
        if tf.executing_eagerly():
            return self.ledger.entry(name, self.ranks)
        with futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(self.ledger.entry, name, self.ranks).result()

    def _run(self, method: str, tensors: list[tf.Tensor], name: str, **options) -> list[tf.Tensor]:
        """Calls `method` in a graph: eager operations of the engine ignore their names."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"`name` must look like 'hvdext.<purpose>.<detail>'. Received: name={name!r}.")
        call = functools.partial(getattr(self, method), name=name, **options)
        if not tf.executing_eagerly():
            return call(tensors)
        key = (method, name, *sorted(options.items()))
        with self._functions_lock:
            if key not in self._functions:
                self._functions[key] = tf.function(call, reduce_retracing=True, autograph=False)
        try:
            return self._functions[key](tensors)
        except tf.errors.OpError:
            self._entry(name).give_up()
            raise


class SoloComm(Communicator):
    """One process on its own: every exchange gives back what went in."""

    def __init__(self) -> None:
        super().__init__(rank=0, ranks=[0], ledger=Ledger(1))

    def subset(self, process_set: ProcessSet) -> Communicator:
        """As in `Communicator`."""
        process_set.place_of(0)
        return self


class HorovodComm(Communicator):
    """The ranks that a launcher started, joined by Horovod.

    Make it once per process, after `horovod.tensorflow.init()`; `hvdext.init()` does both.
    """

    def __init__(self, process_set: ProcessSet | None = None, ledger: Ledger | None = None):
        from horovod.common import process_sets as engine_sets
        from horovod.tensorflow import mpi_ops

        self._ops = mpi_ops
        if process_set is None:
            self._engine_set = engine_sets.global_process_set
            ranks: Sequence[int] = range(mpi_ops.size())
        else:
            ranks = process_set.ranks
            # A rank on its own exchanges nothing, so that its set needs no registration.
            alone = len(ranks) == 1
            self._engine_set = None if alone else _engine_set(process_set, mpi_ops, engine_sets)
        ranks = tuple(ranks)
        super().__init__(ranks.index(mpi_ops.rank()), ranks, ledger or Ledger(len(ranks)))
        self._subsets: dict[tuple[int, ...], HorovodComm] = {}

    def subset(self, process_set: ProcessSet) -> Communicator:
        """As in `Communicator`."""
        process_set.place_of(self._ops.rank())
        if process_set.ranks == self.ranks:
            return self
        if process_set.ranks not in self._subsets:
            self._subsets[process_set.ranks] = HorovodComm(process_set, self.ledger)
        return self._subsets[process_set.ranks]

    def _allreduce(self, tensors, name, prescale, postscale, op):
        # One flat message: handing the engine several tensors costs it more than this copy.
        flat = tensors[0] if len(tensors) == 1 else tf.concat([tf.reshape(t, [-1]) for t in tensors], 0)
        inside = _exact(flat, prescale, postscale)
        total = self._ops._allreduce(
            flat if inside else _scaled(flat, prescale),
            name=name,
            op=getattr(self._ops, op.capitalize()),
            prescale_factor=prescale if inside else 1.0,
            postscale_factor=postscale if inside else 1.0,
            ignore_name_scope=True,
            process_set=self._engine_set,
        )
        total = total if inside else _scaled(total, postscale)
        if len(tensors) == 1:
            return [total]
        parts = tf.split(total, [tf.size(t) for t in tensors])
        return [tf.reshape(p, tf.shape(t)) for p, t in zip(parts, tensors, strict=True)]

    def _reducescatter(self, tensor, name, prescale, postscale):
        inside = _exact(tensor, prescale, postscale)
        total = self._ops._reducescatter(
            tensor if inside else _scaled(tensor, prescale),
            name=name,
            op=self._ops.Sum,
            ignore_name_scope=True,
            process_set=self._engine_set,
            prescale_factor=prescale if inside else 1.0,
            postscale_factor=postscale if inside else 1.0,
        )
        return total if inside else _scaled(total, postscale)

    def _allgather(self, tensor, name):
        return self._ops.allgather(tensor, name=name, ignore_name_scope=True, process_set=self._engine_set)

    def _alltoall(self, tensor, splits, name):
        received, _ = self._ops.alltoall(
            tensor, splits=splits, name=name, ignore_name_scope=True, process_set=self._engine_set
        )
        return received

    def _broadcast(self, tensor, root, name):
        return self._ops.broadcast(
            tensor,
            self.ranks[root],
            name=name,
            ignore_name_scope=True,
            process_set=self._engine_set,
        )

    def _join(self):
        # Eagerly: of an operation without inputs TensorFlow may keep the first result of a graph.
        return int(self._ops.join())


def _engine_set(process_set, mpi_ops, engine_sets):
    """Horovod's own object for the set with these ranks; it must have been registered."""
    known = mpi_ops._basics._get_process_set_ids_and_ranks()
    for number, ranks in known.items():
        if tuple(sorted(ranks)) == process_set.ranks:
            return engine_sets._temp_process_set_object(number)
    raise ValueError(
        "`process_set` must be registered: pass it to `hvd.init(process_sets=[...])` or to "
        f"`hvd.add_process_set()`. Received: {process_set}; registered: {sorted(known.values())}."
    )


# -- which communicator this process (or thread) uses -------------------------------------------------

_process_comm: Communicator | None = None
_thread = threading.local()


def current() -> Communicator:
    """The communicator that `hvd.init()` made for this process.

    Raises:
        RuntimeError: if `hvd.init()` has not been called.
    """
    comm = getattr(_thread, "comm", None) or _process_comm
    if comm is None:
        raise RuntimeError(
            "hvdext has not been initialised: call `hvd.init()` at the top of the script, before "
            "anything that trains, shards or broadcasts."
        )
    return comm


def set_process_comm(comm: Communicator | None) -> None:
    """Makes `comm` what `current()` returns in this process."""
    global _process_comm
    _process_comm = comm


class use:
    """Context in which `current()` returns `comm` in this thread."""

    def __init__(self, comm: Communicator):
        self._comm = comm

    def __enter__(self) -> Communicator:
        self._outer = getattr(_thread, "comm", None)
        _thread.comm = self._comm
        return self._comm

    def __exit__(self, *exc_info) -> None:
        _thread.comm = self._outer


# -- tensors and objects on the way -------------------------------------------------------------------


def can_be_reduced(dtype: tf.DType) -> bool:
    """True for the types that `Communicator.allreduce` takes: real numbers and booleans."""
    return dtype in _REDUCIBLE or dtype in _WIDER


def _check_op(op, prescale, postscale):
    if op not in _OPS:
        raise ValueError(f"`op` must be one of {_OPS}. Received: op={op!r}.")
    if prescale != 1.0 or postscale != 1.0:
        raise ValueError(
            f"`prescale` and `postscale` need op='sum'. Received: {prescale} and {postscale} with op={op!r}."
        )


def _wire(dtype, wider):
    """The type in which the engine sums values of type `dtype`."""
    if not can_be_reduced(dtype):
        raise TypeError(f"`tensors` must hold real numbers that can be summed. Received: {dtype.name}.")
    return wider.get(dtype, dtype)


def _exact(tensor, *factors):
    # The engine holds its factors in float32. Where that is not exact enough, scale outside.
    return tensor.dtype != tf.float64 or all(float(np.float32(factor)) == factor for factor in factors)


class _Unpicklable:
    """Travels in place of an object that does not pickle."""

    def __init__(self, reason: str):
        self.reason = reason


def _pickled(value):
    try:
        data = cloudpickle.dumps(value)
    except Exception as error:  # pickling runs the object's own code
        data = cloudpickle.dumps(_Unpicklable(f"{type(value).__name__}: {error}"))
    return np.frombuffer(data, np.uint8)


def _unpickled(array):
    return pickle.loads(array.tobytes())


def _check_pickled(values):
    problems = {rank: v.reason for rank, v in values.items() if isinstance(v, _Unpicklable)}
    if problems:
        lines = [f"rank {rank}: {reason}" for rank, reason in problems.items()]
        raise ValueError("`obj` must be an object that pickles. Received:\n  " + "\n  ".join(lines))


def _scaled(tensor: tf.Tensor, factor: float) -> tf.Tensor:
    # Not tf.cast: it would round a Python number to float32 first.
    return tensor if factor == 1.0 else tensor * tf.constant(factor, tensor.dtype)


def _bytes(tensor: tf.Tensor) -> tf.Tensor:
    return tf.size(tensor, out_type=tf.int64) * tensor.dtype.size


def _movable(tensor: tf.Tensor) -> tf.Tensor:
    """`tensor` in a type the engine moves; others as their bytes, along a new last axis."""
    return tensor if tensor.dtype in _MOVABLE else tf.bitcast(tensor, tf.uint8)


def _moved(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tensor if tensor.dtype == dtype else tf.bitcast(tensor, dtype)
