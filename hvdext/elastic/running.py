"""`hvd.elastic.run`: calls the training function again, from the last commit, when ranks leave or come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hvdext.comm.current import current
from hvdext.comm.horovod_comm import HorovodComm
from hvdext.common.arguments import suggests_keywords
from hvdext.elastic.failure import is_lost_rank, recoverable
from hvdext.launch import runtime


@suggests_keywords
def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the function that trains; its first argument is the state.

        @hvd.elastic.run
        def train(state): ...

        train(state)

    Before every call the state is synchronised: all ranks hold rank 0's values. When a rank is lost, the
    others restore what was committed last; when the launcher announces a change of hosts, all ranks stop at
    the next commit and keep what they have. Then rank and size are made anew and the function is called
    again.

    A rank that joins later runs the script from its top, while the others wait in the synchronisation: a
    collective between `hvd.init()` and the decorated function would never meet anybody. Whatever depends on
    rank or size (shards of the data, a `tf.function` of one's own that exchanges something, learning rates)
    is made inside the function.

    Without a launcher the function is called once, and Horovod need not be installed.

    Args:
        func: the training function, `func(state, *args, **kwargs)`.

    Returns:
        A function with the same arguments, which returns what `func` returns. An error that no lost rank
        has caused is raised as it is.
    """
    if not callable(func):
        raise TypeError(f"`func` must be a function. Received: func={func!r}.")

    def train(state, *args, **kwargs):
        with recoverable():
            return func(state, *args, **kwargs)

    @functools.wraps(func)
    def elastic(state, *args, **kwargs):
        if not isinstance(current(), HorovodComm):
            state.sync()
            return func(state, *args, **kwargs)
        from horovod.common.elastic import run_fn

        return run_fn(train, _reset)(state, *args, **kwargs)

    return elastic


def _reset() -> None:
    """Leaves the engine and joins it again: the launcher says which rank of how many this process is now."""
    while True:
        try:
            runtime.restart()
            return
        except tf.errors.OpError as error:  # one more rank was lost on the way
            if not is_lost_rank(error):
                raise
