"""A worker: the process of a rank that has TensorFlow, holds the models and computes batches.

Its main thread receives, one thread computes, and one loads models beside that. It is started by a
supervisor, dies with it, and ends when its connection to the front does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdext.common.log import logger
from hvdext.common.wording import describe, shortened
from hvdext.inference.deploy.manifest import Manifest
from hvdext.inference.deploy.model_store import Store
from hvdext.serving.protocols.tensors import DTYPES
from hvdext.serving.scheduler.files import identity_of
from hvdext.serving.scheduler.rollout import signatures_json
from hvdext.serving.transport.connection import Connection, accept, connect
from hvdext.serving.transport.frames import Frame, FrameError
from hvdext.serving.transport.peer import SILENCE_SECONDS

Load = Callable[..., Any]  # served_model.load
_HEAD, _TAIL = 500, 1500  # characters of an error that travel: the cause tends to stand at the end
_log = logger("serve")


@dataclass(frozen=True)
class Post:
    """Where a worker works.

    Attributes:
        rank: its rank.
        size: how many ranks there are.
        addresses: the front's.
        token: the job's secret.
        pipeline: whether it computes one stage, and the next one gets its outputs.
        restarts: how many workers of this rank there were before.
    """

    rank: int
    size: int
    addresses: Sequence[tuple[str, int]]
    token: str
    pipeline: bool = False
    restarts: int = 0


class Worker:
    """Answers what the front asks, until the connection ends.

    Args:
        post: where it works.
        load: `served_model.load`, or the like.
    """

    def __init__(self, post: Post, load: Load):
        self._post = post
        self._load = load
        self._models: dict[int, Any] = {}
        self._batches: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._next: Connection | None = None
        facts = {
            "role": "worker",
            "rank": post.rank,
            "size": post.size,
            "restarts": post.restarts,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        if post.pipeline:
            local = all(host.startswith("127.") for host, _ in post.addresses)
            self._listener = socket.create_server(("127.0.0.1" if local else "", 0))
            facts["link_port"] = self._listener.getsockname()[1]
        self._front, _ = connect(post.addresses, post.token, facts)

    def run(self) -> None:
        """Works until the front closes the connection or it is lost."""
        tasks = [self._compute_batches, self._load_models]
        if self._post.pipeline:
            tasks.append(self._accept_links)
        for task in tasks:
            threading.Thread(target=task, name=f"hvdext{task.__name__}", daemon=True).start()
        with contextlib.suppress(OSError, FrameError):
            self._front.wait_at_most(2 * SILENCE_SECONDS)  # the front pings more often
            while (frame := self._front.receive()) is not None:
                self._handle(frame)
        self.close()

    def ask_to_end(self, reason: str) -> None:
        """Tells the front that this process was asked to end: it answers what it has and ends all ranks."""
        with contextlib.suppress(OSError):
            self._front.send({"kind": "asked_to_end", "reason": reason})

    def close(self) -> None:
        """Ends all connections."""
        self._front.close()
        if self._post.pipeline:
            self._listener.close()
        if self._next is not None:
            self._next.close()

    def _handle(self, frame: Frame) -> None:
        if frame.kind == "batch":
            self._batches.put(frame)
        elif frame.kind in ("load", "link", "unload"):
            self._orders.put(frame)

    # -- batches -----------------------------------------------------------------------------------

    def _compute_batches(self) -> None:
        with contextlib.suppress(OSError):  # the front is gone
            while True:
                self._compute(self._batches.get())

    def _compute(self, frame: Frame) -> None:
        header = frame.header
        start = time.perf_counter()
        try:
            model = self._models.get(header["model"])
            if model is None:
                raise LookupError(f"rank {self._post.rank} does not have the model")
            outputs = model.of(header["signature"]).run(frame.tensors)
        except Exception as error:
            self._front.send({"kind": "failed", "id": header["id"], "error": _text(error)})
            return
        seconds = {**header.get("seconds", {}), str(self._post.rank): time.perf_counter() - start}
        answer = {key: header[key] for key in ("id", "model", "signature", "rows")} | {"seconds": seconds}
        following = self._next
        if following is None:
            self._front.send({"kind": "done", **answer}, outputs)
            return
        try:
            following.send({"kind": "batch", **answer}, outputs)
        except OSError as error:
            self._front.send({"kind": "link_lost", "reason": _text(error)})

    # -- orders ------------------------------------------------------------------------------------

    def _load_models(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                frame = self._orders.get()
                if frame.kind == "unload":
                    self._models.pop(frame.header["model"], None)
                    gc.collect()  # a model's layers and graphs refer to each other
                    continue
                try:
                    answer = self._link(frame) if frame.kind == "link" else self._load_model(frame)
                except Exception as error:
                    answer = {"kind": "failed", "error": _text(error)}
                self._front.send({**answer, "id": frame.header["id"]})

    def _load_model(self, frame: Frame) -> dict[str, Any]:
        header = frame.header
        model = self._models.get(header["model"])
        if model is None:
            manifest = Manifest.from_json(header["manifest"])
            path = Path(header["path"])
            if identity_of(path) != header["identity"]:
                path = self._fetch(manifest)
            model = self._load(path, stage=header["stage"], stages=header["stages"])
            warm_up(model, header["sizes"])
            self._models[header["model"]] = model
        return {
            "kind": "loaded",
            "signatures": signatures_json(model.signatures),
            "platform": model.platform,
        }

    def _fetch(self, manifest: Manifest) -> Path:
        """The model from this host's cache; the first worker of the host brings it there."""
        store = Store()
        with store.lock(manifest):
            path = store.find(manifest)
            if path is not None:
                return path
            facts = {"role": "fetch", "digest": manifest.digest}
            connection, _ = connect(self._post.addresses, self._post.token, facts)
            connection.wait_at_most(2 * SILENCE_SECONDS)
            with contextlib.closing(connection), store.receive(manifest) as writer:
                for chunk in _chunks(connection):
                    writer.write(chunk)
            return writer.path

    # -- the stages before and after -----------------------------------------------------------------

    def _link(self, frame: Frame) -> dict[str, Any]:
        if self._next is not None:
            self._next.close()
        host, port = frame.header["address"]
        facts = {"role": "stage", "rank": self._post.rank}
        self._next, _ = connect([(host, port)], self._post.token, facts)
        return {"kind": "linked"}

    def _accept_links(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                stage, _ = accept(self._listener, self._post.token)
                threading.Thread(target=self._follow, args=[stage], daemon=True).start()

    def _follow(self, stage: Connection) -> None:
        with contextlib.suppress(OSError, FrameError):
            while (frame := stage.receive()) is not None:
                self._batches.put(frame)
        stage.close()


def warm_up(model: Any, sizes: Sequence[int]) -> None:
    """Computes one batch of zeros of each size, so that the first request of a size does not wait longer.

    A model with open lengths, or one that does not take zeros, is left as it is.
    """
    specs = model.takes
    if any(None in spec.shape[1:] or spec.datatype not in DTYPES for spec in specs):
        return
    for rows in sizes:
        zeros = {spec.name: _zeros(spec, rows) for spec in specs}
        try:
            model.run(zeros)
        except Exception:
            return  # what it takes, requests will show


def _zeros(spec, rows):
    shape = tuple(rows if length is None else length for length in spec.shape)
    return np.full(shape, b"" if spec.datatype == "BYTES" else 0, DTYPES[spec.datatype])


def _chunks(connection):
    while True:
        connection.send({"kind": "next"})
        frame = connection.receive()
        if frame is None or frame.kind == "failed":
            reason = "the front has closed the connection" if frame is None else frame.header["error"]
            raise ConnectionError(f"the model could not be fetched: {reason}")
        if frame.kind == "end":
            return
        yield frame.tensors["bytes"].data


def _text(error: Exception) -> str:
    text = describe(error)
    if len(text) > _HEAD + _TAIL:
        _log.error("%s", text)
    return shortened(text, _HEAD, _TAIL, ", which this rank's log has")
