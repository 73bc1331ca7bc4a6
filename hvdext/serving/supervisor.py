"""A supervisor: starts its rank's worker, and starts it again when it dies. Knows nothing of TensorFlow."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvdext.serving.transport.connection import Connection, connect
from hvdext.serving.transport.frames import FrameError
from hvdext.serving.transport.handshake import Refused
from hvdext.serving.transport.peer import SILENCE_SECONDS
from hvdext.serving.worker.process import VARIABLE
from hvdext.serving.worker.worker import Post

_FIRST_PAUSE = 0.5  # seconds before a worker is started again; twice as long each time
_LONGEST_PAUSE = 30.0
_LONG_LIFE = 60.0  # a worker that lived so long has not failed at its start
_RETRY = 0.5


class FrontMissing(Exception):
    """The front cannot be reached, or does not want this rank; the message says why."""


@dataclass(frozen=True)
class Front:
    """Where the front is reached.

    Attributes:
        addresses: hosts and ports.
        token: the job's secret.
    """

    addresses: tuple[tuple[str, int], ...]
    token: str


class Supervisor:
    """Keeps one worker running until the front says that the job ends.

    Args:
        post: the worker's, but for addresses and token.
        look_for_front: where the front is, None if that is not known yet; raises `FrontMissing` if it has
            given up.
        worker: what a worker needs besides its post: "threads", "local_rank", "modules".
        patience: seconds that the front may be gone.
        end_seconds: that the front may take to end once this rank was asked to.
        command: what starts a worker.
    """

    def __init__(
        self,
        post: Post,
        look_for_front: Callable[[], Front | None],
        worker: Mapping[str, Any],
        patience: float,
        end_seconds: float,
        command: tuple[str, ...] = (sys.executable, "-m", "hvdext.serving.worker.process"),
    ):
        self._post = post
        self._look_for_front = look_for_front
        self._config = dict(worker)
        self._patience = patience
        self._end_seconds = end_seconds
        self._command = command
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._process: subprocess.Popen | None = None
        self._started = 0.0
        self._starts = 0
        self._pause = _FIRST_PAUSE
        self._restart_at: float | None = None
        self._end_by: float | None = None

    def run(self) -> None:
        """Supervises until the front says that the job ends. The worker is left to die with this process.

        (horovodrun, asked to end, freezes a rank's process as soon as its children are gone. So the worker
        must not be the first to end.)

        Raises:
            FrontMissing: if the front is gone for too long, or refuses this rank.
        """
        while (connected := self._connect()) is not None:
            connection, front = connected
            try:
                if self._supervise(connection, front):
                    return
            finally:
                connection.close()
            self._kill()

    def ask_to_end(self, reason: str) -> None:
        """Tells the front that this rank was asked to end. May be called in a signal handler."""
        if self._end_by is None:
            self._end_by = time.monotonic() + self._end_seconds
        self._events.put(("asked", reason))

    def _connect(self) -> tuple[Connection, Front] | None:
        """A connection to the front; None if this rank was asked to end before there was one."""
        end = time.monotonic() + self._patience
        problem = "it has not told its address"
        while self._end_by is None:
            front = self._look_for_front()
            if front is not None:
                facts = {"role": "supervisor", "rank": self._post.rank, "size": self._post.size}
                try:
                    return connect(front.addresses, front.token, facts)[0], front
                except Refused as error:
                    raise FrontMissing(f"rank 0 refuses rank {self._post.rank}: {error}") from error
                except ConnectionError as error:
                    problem = str(error)
            if time.monotonic() > end:
                raise FrontMissing(
                    f"rank {self._post.rank} has not reached rank 0 within {self._patience:g} s: {problem}"
                )
            time.sleep(_RETRY)
        return None

    def _supervise(self, connection: Connection, front: Front) -> bool:
        """Handles what happens; False once the connection is lost, True at the job's end."""
        connection.wait_at_most(2 * SILENCE_SECONDS)
        threading.Thread(target=self._receive, args=[connection], daemon=True).start()
        self._start(front)
        while True:
            times = [at for at in (self._restart_at, self._end_by) if at is not None]
            try:
                wait = max(0.0, min(times) - time.monotonic()) if times else None
                kind, what = self._events.get(timeout=wait)
            except queue.Empty:
                if self._end_by is not None and self._end_by <= time.monotonic():
                    return True
                self._start(front)
                continue
            if kind == "frame" and what.kind == "exit":
                if what.header["error"] is not None:
                    raise FrontMissing(what.header["error"])
                return True
            if kind == "frame" and what.kind == "kill":
                if self._process is not None and self._process.pid == what.header["pid"]:
                    self._process.kill()
            elif kind == "lost" and what is connection:
                return False
            elif kind == "ended" and what is self._process:
                self._ended()
            elif kind == "asked":
                with contextlib.suppress(OSError):
                    connection.send({"kind": "asked_to_end", "reason": what})

    def _receive(self, connection: Connection) -> None:
        with contextlib.suppress(OSError, FrameError):
            while (frame := connection.receive()) is not None:
                self._events.put(("frame", frame))
        self._events.put(("lost", connection))

    # -- the worker --------------------------------------------------------------------------------

    def _start(self, front: Front) -> None:
        post = replace(
            self._post, addresses=front.addresses, token=front.token, restarts=max(0, self._starts)
        )
        config = {**self._config, "post": asdict(post), "supervisor": os.getpid()}
        self._restart_at = None
        self._started = time.monotonic()
        self._starts += 1
        process = subprocess.Popen(
            self._command,
            env={"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, VARIABLE: json.dumps(config)},
            stdin=subprocess.DEVNULL,
        )
        self._process = process

        def wait():
            process.wait()
            self._events.put(("ended", process))

        threading.Thread(target=wait, name="hvdext-worker-wait", daemon=True).start()

    def _ended(self) -> None:
        now = time.monotonic()
        if now - self._started > _LONG_LIFE:
            self._pause = _FIRST_PAUSE
        self._restart_at = now + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        self._process = None

    def _kill(self) -> None:
        """Ends the worker: it belongs to a front that is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._restart_at = None
