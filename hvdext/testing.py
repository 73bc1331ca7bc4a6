"""Several ranks as threads of one process, for tests that should not pay for processes.

    def one_rank(comm):
        return comm.allreduce([tf.constant([comm.rank])], "hvdext.demo")[0].numpy()

    assert [r.item() for r in run_ranks(3, one_rank)] == [3, 3, 3]

The sums, gathers and sends are real: ranks hold different values and meet in a room. Give TensorFlow
more inter-op threads than ranks times collectives in flight before its first operation
(`tf.config.threading.set_inter_op_parallelism_threads`), since each waiting collective holds one.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.current import use
from hvdext.comm.ledger import Ledger
from hvdext.keras_tools.in_threads import make_functional_in_turn


class Room:
    """Where the threads of one job meet: each brings a value and takes home everybody's.

    Args:
        timeout: seconds after which a wait ends with a `TimeoutError` that names who is missing.
    """

    def __init__(self, timeout: float = 30.0):
        self._timeout = timeout
        self._changed = threading.Condition()
        self._brought: dict[tuple, dict[int, Any]] = {}
        self._taken: dict[tuple, int] = {}
        self._turns: dict[tuple, int] = {}
        self._failed: int | None = None

    def swap(self, name: str, rank: int, members: tuple[int, ...], value: Any) -> list:
        """Waits until all `members` have called with this `name`; returns their values in order."""
        with self._changed:
            turn = self._turns.get((name, members, rank), 0)
            self._turns[name, members, rank] = turn + 1
            meeting = (name, members, turn)
            brought = self._brought.setdefault(meeting, {})
            brought[rank] = value
            self._changed.notify_all()
            ready = self._changed.wait_for(
                lambda: len(brought) == len(members) or self._failed is not None, self._timeout
            )
            if len(brought) < len(members):
                missing = sorted(set(members) - set(brought))
                if self._failed is not None:
                    raise RuntimeError(f"{name}: rank {self._failed} has failed; waiting is over")
                assert not ready
                raise TimeoutError(f"{name}: rank {rank} waited {self._timeout} s for ranks {missing}")
            self._taken[meeting] = self._taken.get(meeting, 0) + 1
            if self._taken[meeting] == len(members):
                del self._brought[meeting], self._taken[meeting]
            return [brought[member] for member in members]

    def fail(self, rank: int) -> None:
        """Ends every wait, now and later, because `rank` has raised."""
        with self._changed:
            if self._failed is None:
                self._failed = rank
            self._changed.notify_all()


class ThreadComm(Communicator):
    """One rank's view of a `Room`; see `run_ranks`."""

    def __init__(self, rank: int, ranks: Sequence[int], room: Room, ledger: Ledger | None = None):
        ranks = tuple(ranks)
        super().__init__(ranks.index(rank), ranks, ledger or Ledger(len(ranks)))
        self._room = room
        self._me = rank

    def _subset(self, ranks):
        return ThreadComm(self._me, ranks, self._room, self.ledger)

    def _swap(self, name, value):
        return self._room.swap(name, self._me, self.ranks, value)

    def _call(self, function, tensors, dtypes):
        """What `function` makes of the tensors' arrays; called eagerly, it fails as it does in a graph."""
        if not tf.executing_eagerly():
            return tf.numpy_function(function, tensors, dtypes)

        @tf.custom_gradient
        def call(*tensors):
            return _called(function, tensors), _refuse_gradient

        return call(*tensors)

    def _meet(self, name, arrays, settings):
        """Everybody's arrays; like the engine, an error for everybody if they do not fit together."""
        mine = ([(array.shape, array.dtype) for array in arrays], settings)
        met = self._swap(name, (arrays, mine))
        if any(theirs != mine for _, theirs in met):
            raise ValueError(f"{name}: mismatched tensors or settings: {[theirs for _, theirs in met]}")
        return [theirs for theirs, _ in met]

    def _allreduce(self, tensors, name, prescale, postscale, op):
        dtype = tensors[0].dtype.as_numpy_dtype
        function = {"sum": np.add, "min": np.minimum, "max": np.maximum, "product": np.multiply}[op]

        def reduced(*arrays):
            scaled = [array * dtype(prescale) for array in arrays] if prescale != 1 else list(arrays)
            columns = zip(*self._meet(name, scaled, (op, prescale, postscale)), strict=True)
            totals = [functools.reduce(function, column) for column in columns]
            return [(t * dtype(postscale) if postscale != 1 else t).astype(dtype) for t in totals]

        results = self._call(reduced, tensors, [t.dtype for t in tensors])
        for result, tensor in zip(results, tensors, strict=True):
            result.set_shape(tensor.shape)
        return results

    def _reducescatter(self, tensor, name, prescale, postscale):
        dtype = tensor.dtype.as_numpy_dtype

        def scattered(array):
            scaled = [array * dtype(prescale) if prescale != 1 else array]
            columns = self._meet(name, scaled, (prescale, postscale))
            total = functools.reduce(np.add, [column for (column,) in columns])
            block = np.array_split(total, self.size)[self.rank]
            return (block * dtype(postscale) if postscale != 1 else block).astype(dtype)

        result = self._call(scattered, [tensor], tensor.dtype)
        result.set_shape([None, *tensor.shape[1:]])
        return result

    def _allgather(self, tensor, name):
        def gathered(array):
            return np.concatenate(self._swap(name, array))

        result = self._call(gathered, [tensor], tensor.dtype)
        result.set_shape([None, *tensor.shape[1:]])
        return result

    def _alltoall(self, tensors, name):
        def exchanged(array, splits):
            parts = np.split(array, np.cumsum(splits)[:-1])
            return np.concatenate([sent[self.rank] for sent in self._swap(name, parts)])

        result = self._call(exchanged, tensors, tensors[0].dtype)
        result.set_shape([None, *tensors[0].shape[1:]])
        return result

    def _broadcast(self, tensors, name, root):
        def spread(*arrays):
            return list(self._meet(name, arrays, root)[root])

        results = self._call(spread, tensors, [tensor.dtype for tensor in tensors])
        for result, tensor in zip(results, tensors, strict=True):
            result.set_shape(tensor.shape)
        return results


def _called(function, tensors):
    try:
        results = function(*[np.array(tensor) for tensor in tensors])
    except (ValueError, TypeError) as error:
        raise tf.errors.InvalidArgumentError(None, None, f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise tf.errors.UnknownError(None, None, f"{type(error).__name__}: {error}") from error
    return [tf.constant(r) for r in results] if isinstance(results, list) else tf.constant(results)


def _refuse_gradient(*_):
    raise LookupError("Collectives of ranks as threads have no gradients of their own.")


def run_ranks(size: int, target: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list:
    """Calls `target(comm, *args)` on `size` ranks at once, each a thread with a `ThreadComm`.

    Within `target`, `hvdext.comm.current.current()` is that rank's communicator.

    Args:
        size: how many ranks, at least 1.
        target: the ranks' program.
        *args: handed to every rank.
        timeout: seconds that any rank waits for another.

    Returns:
        What each rank returned, in rank order.

    Raises:
        Exception: what the first rank that failed raised; the others are woken and end too.
    """
    room = Room(timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def program(rank):
        comm = ThreadComm(rank, range(size), room)
        try:
            with use(comm):
                results[rank] = target(comm, *args)
        except BaseException as error:
            errors.append(error)
            room.fail(rank)

    make_functional_in_turn()
    threads = [threading.Thread(target=program, args=(rank,), daemon=True) for rank in range(size)]
    with _parsing_in_turn():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


@contextlib.contextmanager
def _parsing_in_turn() -> Iterator[None]:
    """While it is entered, one thread at a time parses Python, as AutoGraph does.

    Python 3.11 counts the depth of all threads' trees in one number: if one collects garbage amid a tree and
    another goes on with its own, both fail with "AST constructor recursion depth mismatch" (CPython's
    gh-106905).
    """
    parse, lock = ast.parse, threading.RLock()

    @functools.wraps(parse)
    def in_turn(*args, **kwargs):
        with lock:
            return parse(*args, **kwargs)

    ast.parse = in_turn
    try:
        yield
    finally:
        ast.parse = parse
