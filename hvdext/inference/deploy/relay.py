"""A file's chunks, handed from rank to rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator

_NAME = "hvdext.deploy.chunk"
_NOTHING = np.zeros(0, np.uint8)


def number_of_steps(route: Sequence[int], count: int) -> int:
    """How many steps it takes until the last rank of `route` has `count` chunks."""
    return count + len(route) - 2 if count else 0


def relay(
    comm: Communicator,
    route: Sequence[int],
    count: int,
    next_chunk: Callable[[], bytes],
    take: Callable[[np.ndarray], None],
    step_done: Callable[[int], None],
) -> None:
    """Gives `count` chunks from the first rank of `route` to all others of it. Every rank must call it.

    At step t the first rank sends chunk t to the second, which sends chunk t - 1 to the third, and so on. A
    chunk goes once over each link, all links are busy at the same time, and nobody holds more than two:

        step    0      1      2      3
        0 -> 1  c0     c1     c2
        1 -> 2         c0     c1     c2

    Args:
        comm: all ranks.
        route: ranks of `comm`, each once.
        count: how many chunks there are.
        next_chunk: called on the first rank, once for each chunk; must not raise.
        take: called on the other ranks of the route with each chunk, in order, uint8; must not raise.
        step_done: called with the number of steps so far.
    """
    place = route.index(comm.rank) if comm.rank in route else None
    held = _NOTHING
    for step in range(number_of_steps(route, count)):
        out, splits = _NOTHING, np.zeros(comm.size, np.int32)
        if place is not None and place < len(route) - 1 and 0 <= step - place < count:
            out = np.frombuffer(next_chunk(), np.uint8) if place == 0 else held
            splits[route[place + 1]] = len(out)
        received = comm.alltoall(tf.constant(out), splits, _NAME).numpy()
        if place and 0 <= step - place + 1 < count:
            take(received)
            held = received
        step_done(step + 1)
