"""Data shared by load: a rank takes a batch when it is ready for one, so that a slow rank gets less."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.failures import on_all, on_root
from hvdext.comm.grid import active_grid
from hvdext.common.arguments import suggests_keywords
from hvdext.common.background import Background
from hvdext.common.checks import require_positive, require_whole
from hvdext.data.arrays import aligned_arrays, gathered
from hvdext.data.sampler import Order
from hvdext.keras_tools.data import DatasetAround

_NAME = "hvdext.data.by_load"
_ENDLESS = 2**62


@suggests_keywords
def shared_by_load(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
    initial_epoch: int = 0,
    host: str | None = None,
    timeout: float = 60.0,
) -> SharedByLoad:
    """Batches of arrays that the ranks share by load: whoever is ready takes the next one.

    For ranks that train at their own pace, as with `hvd.sync.AsyncGossip()`: they make different numbers of
    steps. Every rank calls it with the same data and the same arguments.

    ```python
    with hvd.data.shared_by_load(x_train, y_train, batch_size=32) as data:
        model.fit(data, epochs=10, shuffle=False, callbacks=[hvd.sync.AsyncGossip()])
    ```

    In each epoch every sample goes to exactly one rank, in an order that all ranks derive from `seed`; which
    rank gets it depends on the load. What travels are the numbers of batches, never the samples: rank 0 runs
    a server of the tf.data service whose dynamic sharding deals out each number once. A rank asks for one
    number ahead and holds two or three at most.

    Nobody waits for anybody at the end of an epoch. A rank that is slower than all the others together may
    find that nothing of an epoch is left for it; its epoch is then empty. Do not put anything around it that
    communicates at every step (`hvd.DistributedOptimizer`); once per epoch, as `MetricAverageCallback` does,
    is possible: the ranks' epochs end within a few batches of each other.

    When a rank dies, at most the three batches it holds are lost, the rest goes to the others. When rank 0
    dies there are no batches any more: the others get an error after `timeout` at the latest.

    Args:
        x: arrays with samples along the first axis; NumPy arrays, tensors or nested structures of them.
        y: targets, like `x` with as many samples.
        sample_weight: one weight per sample, with `y`.
        batch_size: samples per batch, at least 1. An epoch's last batch takes what is left.
        shuffle: whether every epoch has a new order, or all have that of the data.
        seed: non-negative integer, the same on every rank.
        initial_epoch: the number of the first epoch, at least 0, to resume a training.
        host: the name or address by which the other ranks reach rank 0. Default: "localhost" if all ranks
            are on one host, else rank 0's host name.
        timeout: seconds after which a rank that gets no batch raises an error.

    Returns:
        A `SharedByLoad`, to be closed by all ranks: use it in a `with` statement.

    Raises:
        ValueError: if an argument breaks its rule. On every rank alike: if the ranks' data or settings
            differ.
        RuntimeError: before `hvd.init()`. On every rank alike, or an error of a more fitting class (`OSError`
            or `TimeoutError`): if rank 0 cannot start its servers, or a rank gets nothing from them.
    """
    comm = current()
    facts = {
        "batch_size": batch_size,
        "shuffle": bool(shuffle),
        "seed": seed,
        "initial_epoch": initial_epoch,
    }
    problem, total = None, 0
    try:
        require_whole("batch_size", batch_size, 1)
        require_whole("seed", seed, 0)
        require_whole("initial_epoch", initial_epoch, 0)
        require_positive("timeout", timeout)
        arrays, total = aligned_arrays(x, y, sample_weight)
        _require_batches(total, batch_size, comm.size)
        _require_data_parallel(active_grid())
    except ValueError as error:  # the other ranks must hear of it
        problem = str(error)
    agreement.check(comm, "hvd.data.shared_by_load", facts | {"samples": total}, problem)
    steps = -(-total // batch_size)
    ahead = _Ahead(_source(comm, initial_epoch * steps, host), timeout)
    ahead.begin(comm)
    return SharedByLoad(arrays, total, batch_size, Order(seed if shuffle else None), initial_epoch, ahead)


def _require_data_parallel(grid):
    if grid is not None and grid.shape.pipeline * grid.shape.slices > 1:
        raise ValueError(
            "hvd.data.shared_by_load gives each rank other samples, and ranks that share a model need the "
            f"same: use `hvd.data.shard`. Received: a call within {grid}.data_parallel()."
        )


class SharedByLoad(DatasetAround):
    """What `shared_by_load` returns: each pass over it is what this rank gets of one epoch.

    A `tf.data.Dataset`, for `fit` as well as for loops of your own. All ranks begin equally many passes, one
    at a time. A rank that leaves a pass early leaves the rest of that epoch to the others.

    Its `cardinality()` is that of a whole epoch, `steps_per_epoch`: the most that a rank can get. If it were
    unknown, Keras would train as many steps in every epoch as this rank happened to make in its first. Keras
    warns when an epoch has ended before that ("Your input ran out of data"), which is meant to be so here. A
    data set made of this one (`map`) no longer knows it: pass `steps_per_epoch` to `fit` then.

    Attributes:
        steps_per_epoch: batches in an epoch, over all ranks.
        total_samples: samples in an epoch, over all ranks.
        batches: how many this rank has taken so far.
        samples: in these batches.
        waited: seconds that this rank has waited for batches.
    """

    def __init__(
        self, arrays: Any, total: int, batch_size: int, order: Order, initial_epoch: int, numbers: _Ahead
    ):
        self._comm = current()
        self.steps_per_epoch = -(-total // batch_size)
        self.total_samples = total
        self.batches = 0
        self.samples = 0
        self._batch_size = batch_size
        self._order = order
        self._next_epoch = initial_epoch
        self._positions: tuple[int, np.ndarray] | None = None
        self._numbers = numbers
        self._is_open = True
        options = tf.data.Options()
        # Prefetching and parallel maps, which it adds by itself, would take batches that nobody asked for.
        options.autotune.enabled = False
        options.experimental_optimization.apply_default_optimizations = False
        options.experimental_optimization.inject_prefetch = False
        spec = tf.TensorSpec([None], tf.int64)
        positions = tf.data.Dataset.from_generator(self._one_pass, output_signature=spec)
        super().__init__(gathered(positions, arrays).with_options(options))

    def __enter__(self) -> SharedByLoad:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._close(is_orderly=kind is None)

    def close(self) -> None:
        """Waits until all ranks have come here, and stops the servers; safe to call twice."""
        self._close(is_orderly=True)

    @property
    def waited(self) -> float:
        """Seconds that this rank has waited for batches."""
        return self._numbers.waited

    def cardinality(self) -> tf.Tensor:
        """Batches in an epoch over all ranks, int64: the most that this rank can get."""
        return tf.constant(self.steps_per_epoch, tf.int64)

    def _one_pass(self) -> Iterator[np.ndarray]:
        """The samples' positions, batch by batch, until a batch belongs to a later epoch."""
        epoch = self._next_epoch
        self._next_epoch += 1
        if not self._is_open:
            raise RuntimeError("The data shared by load are closed: make them anew for another training.")
        # Not `!=`: batches of earlier epochs are left over where a pass was not taken to its end.
        while self._numbers.peek() // self.steps_per_epoch <= epoch:
            positions = self._batch(self._numbers.take())
            self.batches += 1
            self.samples += len(positions)
            yield positions

    def _batch(self, number: int) -> np.ndarray:
        epoch, step = divmod(number, self.steps_per_epoch)
        if self._positions is None or self._positions[0] != epoch:
            self._positions = epoch, self._order.positions(self.total_samples, epoch)
        return self._positions[1][step * self._batch_size : (step + 1) * self._batch_size]

    def _close(self, is_orderly):
        if not self._is_open:
            return
        self._is_open = False
        self._numbers.close(is_orderly)
        if is_orderly:
            self._comm.allgather_object(None, f"{_NAME}.end")
            self._numbers.source.stop()
        else:  # this rank fails, and does not wait for the others, who may still be at it
            Background("hvdext.data.stop").submit(self._numbers.source.stop)


class _Ahead:
    """Asks for the next number while the latest one is worked on.

    Args:
        source: where the numbers come from.
        timeout: seconds to wait for a number.
    """

    def __init__(self, source: _Source, timeout: float):
        self.source = source
        self.waited = 0.0
        self._timeout = timeout
        self._thread = Background("hvdext.data")
        self._next = self._thread.submit(source.next)

    def begin(self, comm: Communicator) -> None:
        """Waits until every rank holds its first number, so that none finds the first epoch empty.

        Raises:
            TimeoutError: on every rank alike, if a number does not come in time.
            RuntimeError: on every rank alike, if a rank gets none.
        """
        on_all(comm, self.peek, "Not every rank gets data from rank 0's servers", f"{_NAME}.begin")

    def peek(self) -> int:
        """The number that `take` will return.

        Raises:
            TimeoutError: if it does not come in time.
        """
        begin = time.perf_counter()
        try:
            return self._next.result(self._timeout)
        except futures.TimeoutError:
            raise TimeoutError(
                f"No batch has come within {self._timeout} s (`timeout`): rank 0, whose server deals them "
                "out, has died, hangs or cannot be reached."
            ) from None
        finally:
            self.waited += time.perf_counter() - begin

    def take(self) -> int:
        """The next number; asks for the one after it."""
        number = self.peek()
        self._next = self._thread.submit(self.source.next)
        return number

    def close(self, is_orderly: bool) -> None:
        """Asks for no more numbers, and leaves the service once none is under way."""
        if is_orderly:
            futures.wait([self._next], self._timeout)
            self.source.leave()
        self._thread.stop()


class _Source:
    """The numbers of batches, of which each rank gets some.

    Args:
        numbers: those that this rank gets.
        servers: a dispatcher and a worker to keep running until `stop`, or nothing.
    """

    def __init__(self, numbers: Iterator, servers: list):
        self._numbers = numbers
        self._servers = servers

    def next(self) -> int:
        """The next number that no rank has had; waits for it."""
        return int(next(self._numbers))

    def leave(self) -> None:
        """Tells the servers that this rank takes no more."""
        self._numbers = iter(())

    def stop(self) -> None:
        """Stops the servers that run here; it may wait for ranks that have not left them."""
        while self._servers:  # the worker before the dispatcher, which it reports to
            self._servers.pop()


def _require_batches(total: int, batch_size: int, size: int) -> None:
    steps = -(-total // batch_size)
    if steps < size:
        raise ValueError(
            "`x` must hold at least as many batches as there are ranks. "
            f"Received: {total} samples, {steps} batches with batch_size={batch_size}, for {size} ranks."
        )


def _source(comm: Communicator, start: int, host: str | None) -> _Source:
    if comm.size == 1:
        return _Source(itertools.count(start), [])
    hosts = comm.allgather_object(socket.gethostname(), f"{_NAME}.hosts")
    if host is None:
        host = "localhost" if len(set(hosts)) == 1 else hosts[0]
    servers: list = []  # rank 0's, who keeps them running

    def start_servers():
        started, service, dataset_id = _started(host, start)
        servers.extend(started)
        return service, dataset_id

    what = "Rank 0 could not start the servers of the tf.data service"
    service, dataset_id = on_root(comm, start_servers, 0, what, f"{_NAME}.address")
    numbers = tf.data.experimental.service.from_dataset_id(
        processing_mode=tf.data.experimental.service.ShardingPolicy.DYNAMIC,
        service=service,
        dataset_id=dataset_id,
        element_spec=tf.TensorSpec([], tf.int64),
        job_name="batches",  # one for all ranks: first come, first served
        max_outstanding_requests=1,
    )
    return _Source(iter(numbers), servers)


def _started(host: str, start: int) -> tuple[list, str, Any]:
    """A dispatcher and a worker on free ports, the dispatcher's address, and the id of the numbers.

    One job deals out the numbers of all epochs: the end of a job takes its clients a second to notice.
    """
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
    port = dispatcher.target.rpartition(":")[2]
    address = f"{host}:{port}"
    worker = service.WorkerServer(
        service.WorkerConfig(dispatcher_address=address, worker_address=f"{host}:%port%")
    )
    numbers = tf.data.Dataset.range(start, _ENDLESS)
    return [dispatcher, worker], f"grpc://{address}", service.register_dataset(f"grpc://{address}", numbers)
