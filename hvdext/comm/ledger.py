"""What the collectives of one process have done: calls, bytes, and which of them is waiting.

Every collective is bracketed by two marks that run inside TensorFlow's graph, next to the collective
itself: one when its inputs are ready, one when its result is there. The marks are plain variables, so
that they cost a few microseconds, can be read from another thread while the graph hangs, and keep the
result of the collective alive (an operation nobody reads would be pruned, and its peers would wait).
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

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

    def __init__(self, name: str, ranks: tuple[int, ...]):
        self.name = name
        self.ranks = ranks
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

    def give_up(self) -> None:
        """Marks the end of a collective that has failed: nobody waits in it any more."""
        self.finished.assign(self.started)


class Unmarked:
    """Stands for the entry of a collective in a graph of TensorFlow 1, which cannot hold eager variables.

    The engine's own report of stalls is then the only one.
    """

    def start(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns `tensors`."""
        return list(tensors)

    def finish(self, results: Sequence[tf.Tensor], sent: int | tf.Tensor) -> None:
        """Marks nothing."""


class Ledger:
    """All entries of one process. Safe to read from any thread.

    Args:
        job_size: how many ranks the job has.

    Attributes:
        notes: what others keep once per job, each under a key of its own: it lives as long as the ranks stay
            joined, and is gone after a restart.
    """

    def __init__(self, job_size: int) -> None:
        self.notes: dict[Hashable, Any] = {}
        self._job_size = job_size
        self._entries: dict[tuple[str, tuple[int, ...]], Entry] = {}
        self._lock = threading.Lock()

    def entry(self, name: str, ranks: tuple[int, ...]) -> Entry:
        """The entry of the collective called `name` among `ranks` (global ranks), made on first use."""
        with self._lock:
            if (name, ranks) not in self._entries:
                self._entries[name, ranks] = Entry(name, ranks)
            return self._entries[name, ranks]

    def known(self, name: str, ranks: tuple[int, ...]) -> Entry | None:
        """The same entry, None if it has not been made yet."""
        return self._entries.get((name, ranks))

    def members(self, label: str) -> tuple[int, ...]:
        """The global ranks that meet in the collective with this label."""
        return self._labelled()[label].ranks

    def give_up(self, label: str) -> None:
        """Marks the end of the collective with this label, which has failed."""
        self._labelled()[label].give_up()

    def progress(self) -> dict[str, tuple[int, int]]:
        """Maps each collective's label to how often it has (started, finished).

        The label is its name, followed by the ranks where they are only some of the job's.
        """
        # `finished` is read first: a run that ends in between then looks unfinished for one more
        # reading, never finished before it started.
        counts = {}
        for label, entry in self._labelled().items():
            finished = int(entry.finished.numpy())
            counts[label] = (int(entry.started.numpy()), finished)
        return counts

    def traffic(self) -> dict[str, Traffic]:
        """Maps each purpose (the second part of `hvdext.<purpose>...`) to what went out for it."""
        totals: dict[str, Traffic] = {}
        for entry in self._labelled().values():
            purpose = entry.name.split(".")[1]
            so_far = totals.get(purpose, Traffic(0, 0))
            totals[purpose] = Traffic(
                so_far.calls + int(entry.finished.numpy()), so_far.bytes + int(entry.sent.numpy())
            )
        return totals

    def _labelled(self) -> dict[str, Entry]:
        with self._lock:
            entries = list(self._entries.values())
        return {_label(entry, self._job_size): entry for entry in entries}


def _label(entry, job_size):
    return entry.name if len(entry.ranks) == job_size else f"{entry.name} of ranks {list(entry.ranks)}"
