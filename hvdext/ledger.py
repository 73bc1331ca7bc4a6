"""What the collectives of one process have done: calls, bytes, and which of them is waiting.

Every collective is bracketed by two marks that run inside TensorFlow's graph, next to the collective
itself: one when its inputs are ready, one when its result is there. The marks are plain variables, so
that they cost a few microseconds, can be read from another thread while the graph hangs, and keep the
result of the collective alive (an operation nobody reads would be pruned, and its peers would wait).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf


@dataclass(frozen=True)
class Traffic:
    """What went out for one purpose.

    Attributes:
        calls: collectives finished.
        bytes: bytes this rank has sent, by the formula of each collective's algorithm. Control
            messages of the engine are not counted.
    """

    calls: int
    bytes: int


class Entry:
    """The marks of one named collective.

    Each is a variable of its own: TensorFlow orders operations on one variable by program order, which
    would keep the second bucket waiting for the first.
    """

    def __init__(self, name: str):
        self.name = name
        with tf.init_scope(), tf.device("/CPU:0"):
            self.started = tf.Variable(0, dtype=tf.int64, trainable=False, name="started")
            self.finished = tf.Variable(0, dtype=tf.int64, trainable=False, name="finished")
            self.sent = tf.Variable(0, dtype=tf.int64, trainable=False, name="sent")

    def start(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Marks the start once every one of `tensors` is there; returns them, ordered after the mark."""
        with tf.control_dependencies(tensors):
            mark = self.started.assign_add(1, read_value=False)
        with tf.control_dependencies([mark]):
            return [tf.identity(tensor) for tensor in tensors]

    def finish(self, results: Sequence[tf.Tensor], sent: int | tf.Tensor) -> None:
        """Marks the end once every one of `results` is there; `sent` is in bytes."""
        with tf.control_dependencies(results):
            self.sent.assign_add(tf.cast(sent, tf.int64), read_value=False)
            self.finished.assign_add(1, read_value=False)


class Ledger:
    """All entries of one communicator, by name. Safe to read from any thread."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()

    def entry(self, name: str) -> Entry:
        """The entry of the collective called `name`, made on first use."""
        with self._lock:
            if name not in self._entries:
                self._entries[name] = Entry(name)
            return self._entries[name]

    def progress(self) -> dict[str, tuple[int, int]]:
        """Maps each collective's name to how often it has (started, finished)."""
        # `finished` is read first: a run that ends in between then looks unfinished for one more
        # reading, never finished before it started.
        counts = {}
        for name, entry in self._snapshot().items():
            finished = int(entry.finished.numpy())
            counts[name] = (int(entry.started.numpy()), finished)
        return counts

    def traffic(self) -> dict[str, Traffic]:
        """Maps each purpose (the second part of `hvdext.<purpose>...`) to what went out for it."""
        totals: dict[str, Traffic] = {}
        for name, entry in self._snapshot().items():
            purpose = name.split(".")[1]
            so_far = totals.get(purpose, Traffic(0, 0))
            totals[purpose] = Traffic(
                so_far.calls + int(entry.finished.numpy()), so_far.bytes + int(entry.sent.numpy())
            )
        return totals

    def _snapshot(self) -> dict[str, Entry]:
        with self._lock:
            return dict(self._entries)
