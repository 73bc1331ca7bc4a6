"""One thread beside training, which runs what it is given in the order it comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """A thread that does not keep the process from ending.

    An executor of the standard library is waited for when the interpreter ends: a rank that fails would
    then wait for an exchange that no other rank takes part in any more.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str):
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, action: Callable[..., Any], *args: Any) -> Future:
        """Runs `action(*args)` after all that was submitted before."""
        future: Future = Future()
        self._jobs.put((future, action, args))
        return future

    def stop(self) -> None:
        """Ends the thread once everything submitted has run."""
        self._jobs.put(None)

    def _work(self):
        while (job := self._jobs.get()) is not None:
            future, action, args = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(action(*args))
            except BaseException as error:
                future.set_exception(error)
