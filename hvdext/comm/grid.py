"""`Grid`: every rank has a place along three axes, and a communicator along each.

Ranks are numbered with slices fastest, then pipeline, then data: what talks most lies closest together.

    Grid(data=2, pipeline=2, slices=2)      slices 0 1 | slices 0 1
                                  data 0:          0 1 |        2 3
                                  data 1:          4 5 |        6 7
                                            pipeline 0 | pipeline 1
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current, use
from hvdext.comm.horovod_comm import HorovodComm
from hvdext.comm.process_sets import ProcessSet
from hvdext.comm.registration import add_process_set
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import is_whole

_thread = threading.local()


class Axes(NamedTuple):
    """One integer for each axis: a grid's lengths, or a rank's place in it."""

    data: int
    pipeline: int
    slices: int


class Grid:
    """The ranks in rows along three axes; makes the process sets that this needs.

    Every rank calls it with the same arguments, after `hvd.init(process_sets="dynamic")`. (Sets that are
    registered already are used; sets of one rank and of all ranks need no registration.)

    ```python
    hvd.init(process_sets="dynamic")
    grid = hvd.Grid(data=2, slices=2)  # on 4 ranks
    with grid.data_parallel():
        ...  # hvd.data.shard, hvd.DistributedOptimizer, callbacks, parameter sync: over the data axis
    ```

    Args:
        data: ranks that hold the same weights and see different samples; None: as many as the other axes
            leave.
        pipeline: ranks that hold different layers.
        slices: ranks that hold slices of the same layers, and see the same samples.

    Attributes:
        shape: the lengths of the axes.
        place: this rank's coordinates.
        data: the communicator of the ranks that share this rank's other two coordinates.
        pipeline: the same along the pipeline; rank i of it holds stage i.
        slices: the same along the slices; rank i of it holds slice i.
        everyone: the communicator of all ranks of the grid.
        data_set: the ranks of `data` as a `ProcessSet`, for arguments called `process_set`.

    Raises:
        ValueError: on every rank alike, if the axes' product is not the number of ranks, the ranks'
            arguments differ or a process set cannot be registered.
        RuntimeError: if `hvd.init()` has not been called.
    """

    @suggests_keywords
    def __init__(self, *, data: int | None = None, pipeline: int = 1, slices: int = 1):
        comm = current()
        given: dict[str, Any] = {"data": data, "pipeline": pipeline, "slices": slices}
        # Python's own: ranks that were given NumPy's agree with them.
        lengths = {axis: int(n) if is_whole(n, 1) else n for axis, n in given.items()}
        agreement.check(comm, "hvd.Grid", lengths, _problem(lengths, comm.size))
        if lengths["data"] is None:
            lengths["data"] = comm.size // (lengths["pipeline"] * lengths["slices"])
        self.shape = Axes(**lengths)
        self.place = place_of(comm.rank, self.shape)
        sets = [
            [ProcessSet(comm.ranks[i] for i in members) for members in groups(self.shape, axis)]
            for axis in range(3)
        ]
        # Slices first: the order of registration must be the same on all ranks.
        register(comm, [one for row in reversed(sets) for one in row])
        register(comm, [ProcessSet(pair) for row in sets[1] for pair in neighbours(row.ranks)])
        me = comm.ranks[comm.rank]
        mine = [next(one for one in row if me in one.ranks) for row in sets]
        self.everyone = comm
        self.data, self.pipeline, self.slices = (comm.subset(one.ranks) for one in mine)
        self.data_set = mine[0]

    @contextlib.contextmanager
    def data_parallel(self) -> Iterator[Communicator]:
        """Context in which hvdext works over the data axis, in this thread, and layers are cut along slices.

        `hvd.rank()` and `hvd.size()` count along the data axis; so do `root_rank`, `hvd.data`, the gradients
        of `hvd.DistributedOptimizer`, the callbacks and every parameter sync. `hvd.verbose()` is still for
        global rank 0 only.
        """
        outer = active_grid()
        _thread.grid = self
        try:
            with use(self.data) as comm:
                yield comm
        finally:
            _thread.grid = outer

    def __repr__(self) -> str:
        lengths = ", ".join(f"{axis}={length}" for axis, length in self.shape._asdict().items())
        return f"Grid({lengths})"


def slices_of(grid: Grid | Communicator | None) -> Communicator:
    """The ranks that share the slices of a layer.

    Args:
        grid: along whose slices; None: those of the grid in whose `data_parallel()` this thread is, otherwise
            all ranks. A communicator stands for itself.

    Raises:
        TypeError: if it is something else.
        RuntimeError: if `hvd.init()` has not been called.
    """
    if grid is None:
        grid = active_grid() or current()
    if not isinstance(grid, (Grid, Communicator)):
        raise TypeError(f"`grid` must be a hvd.Grid or None. Received: grid={grid!r}.")
    return grid.slices if isinstance(grid, Grid) else grid


def active_grid() -> Grid | None:
    """The grid in whose `data_parallel()` this thread is."""
    return getattr(_thread, "grid", None)


def place_of(rank: int, shape: Axes) -> Axes:
    """The coordinates of rank `rank` in a grid with these lengths."""
    return Axes(*(int(i) for i in np.unravel_index(rank, shape)))


def groups(shape: Axes, axis: int) -> list[list[int]]:
    """The ranks along one axis, for all places on the other two.

    Args:
        shape: the lengths of the axes.
        axis: 0 for data, 1 for pipeline, 2 for slices.
    """
    ranks = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), axis, -1)
    return ranks.reshape(-1, shape[axis]).tolist()


def neighbours(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of ranks that stand beside each other in a ring, each once."""
    ring = zip(ranks, [*ranks[1:], ranks[0]], strict=True)
    return sorted({(min(pair), max(pair)) for pair in ring if pair[0] != pair[1]})


def register(comm: Communicator, sets: Sequence[ProcessSet]) -> None:
    """Registers those of `sets` with the engine that are not; every rank must call it with all of them.

    Raises:
        ValueError: on every rank alike, without `hvd.init(process_sets="dynamic")`, if one is missing.
    """
    if not isinstance(comm, HorovodComm):
        return
    for process_set in sets:
        if 1 < process_set.size() < comm.size and process_set.process_set_id is None:
            add_process_set(process_set)


def _problem(lengths, size):
    rule = "must be integers of at least 1 whose product is the number of ranks"
    received = ", ".join(f"{axis}={length!r}" for axis, length in lengths.items())
    given = [length for axis, length in lengths.items() if not (axis == "data" and length is None)]
    wrong = not all(is_whole(length, 1) for length in given)
    if not wrong:
        product = int(np.prod(given))
        wrong = size % product != 0 if lengths["data"] is None else product != size
    if not wrong:
        return None
    return f"`data`, `pipeline` and `slices` {rule}. Received: {received} on {size} ranks."
