"""Long work taken off the event loop: in a thread, one piece after another."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import anyio

from hvdext.serving.service import QueueFull, ServiceError

T = TypeVar("T")
LARGE_BYTES = 1 << 18  # of JSON, of which less is read and written at once


class Offload:
    """A thread for what would hold up the event loop. One, as threads of Python only take turns anyway.

    Args:
        seconds: that work may wait for its turn.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "hvdext-offload")

    async def run(self, work: Callable[[], T]) -> T:
        """What the work returns. Who is cancelled waits no longer; work that has begun comes to its end.

        Raises:
            QueueFull: if its turn does not come.
            ServiceError: as the work raises it.
        """
        try:
            with anyio.fail_after(self._seconds):
                await self._turn.acquire()
        except TimeoutError as error:
            raise QueueFull(
                f"Large requests are read, and large answers written, one after another, and this one has "
                f"waited for {self._seconds:g} s. Try again later."
            ) from error
        done = asyncio.get_running_loop().run_in_executor(self._thread, _uncollected, work)
        done.add_done_callback(lambda _: self._turn.release())
        return await done


def _uncollected(work: Callable[[], T]) -> T:
    # While a tree of millions of lists grows, Python would search it for cycles, which JSON has not, again
    # and again: that took four times as long as reading it, and no other thread goes on meanwhile.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return work()
    except ServiceError as error:
        raise error.with_traceback(None) from None  # its frames hold the tree, to be freed here, not there
    finally:
        if collecting:
            gc.enable()
