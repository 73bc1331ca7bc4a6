"""No collective waits for ever: after a deadline the process ends and says who is missing.

The engine's own stall check tells nothing under its Gloo controller unless it was repaired, so this one
stands on its own. A thread of each rank reads the marks that collectives leave (`hvdext.comm.ledger`) and
posts them on the job's key-value store. When a collective has waited longer than the deadline, the thread
reads everybody's notes, names the ranks that have not started it, and ends the process; the launcher then
ends the others.

In an elastic job that would be the wrong process: the launcher starts anew with those that are left, and
waits for a rank that hangs for ever. There the waiting rank asks the missing ones, over the store, to end;
the watchdog of each does so, and the others go on. Only when that does not help the waiting rank ends.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hvdext.comm.kv_store import KeyValueStore
from hvdext.comm.ledger import Ledger
from hvdext.common.log import logger
from hvdext.common.wording import named_ranks

_log = logger("watchdog")
EXIT_CODE = 124  # as timeout(1)
FIT_MEETING = "hvdext.fit.meeting"  # of ranks at the same point of `fit`
_GRADIENTS = "hvdext.grad."  # what a training step exchanges
JOIN = "hvdext.join"  # the one collective that may wait for long, as long as the others get on
_SECONDS_TO_MEET = 20.0  # for ranks that come to the end of an epoch after each other
_SECONDS_TO_END = 10.0  # for a process that was asked to


@dataclass(frozen=True)
class Note:
    """What one rank has told the others.

    Attributes:
        age: seconds since it was posted.
        progress: the rank's `Ledger.progress()` at that time.
    """

    age: float
    progress: Mapping[str, Sequence[int]]


class Watchdog:
    """Watches one process's collectives from a thread of its own.

    Args:
        rank: this process.
        ledger: whose marks to watch.
        store: where ranks post their progress; None if this rank reaches none, and then the message
            cannot name the missing ranks.
        deadline: seconds that a collective may wait.
        elastic: whether the launcher goes on without a process that has ended.
        clock: tells the time in seconds.
        end: ends this process, saying why.
    """

    def __init__(
        self,
        rank: int,
        ledger: Ledger,
        store: KeyValueStore | None,
        deadline: float,
        *,
        elastic: bool = False,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str], None] | None = None,
    ):
        self._rank = rank
        self._elastic = elastic
        self._interval = min(5.0, deadline / 5)
        self._asked: set[tuple[str, int]] = set()  # the waits whose missing ranks were asked to end
        self._finished: dict[int, int] = {}  # collectives by rank, when a join was last overdue
        self._ledger = ledger
        self._store = store
        self._deadline = deadline
        self._clock = clock
        self._end = end or end_process
        # For each wait since when, and how many collectives this rank had finished then.
        self._waiting_since: dict[tuple[str, int], tuple[float, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hvdext-watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch; ends by itself when the interpreter exits."""
        if self._elastic and self._store is not None:
            self._store.post(_request_key(self._rank), "")  # meant for an earlier bearer of this number
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the watch."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        atexit.unregister(self.stop)

    def look(self) -> None:
        """Posts this rank's progress, and does what is due where a collective has waited for too long.

        The thread that `start` begins calls it every few seconds.
        """
        progress = self._ledger.progress()
        self._post(progress)
        if self._elastic:
            self._heed()
        now, total = self._clock(), sum(finished for _, finished in progress.values())
        waiting = [(n, started) for n, (started, finished) in progress.items() if started > finished]
        self._waiting_since = {key: self._waiting_since.get(key, (now, total)) for key in waiting}
        for (name, run), (since, before) in list(self._waiting_since.items()):
            if now - since <= self._deadline and not self._is_left_alone(name, now - since):
                continue
            if name == JOIN and self._others_advance():
                self._waiting_since[name, run] = (now, total)  # for ranks that still have batches
            else:
                self._overdue(name, run, now - since, goes_on=total > before)

    def _watch(self):
        while not self._stop.wait(self._interval):
            self.look()

    def _others_advance(self):
        """True if another rank has finished a collective since the last time this was asked."""
        notes = {rank: self._read(rank) for rank in self._ledger.members(JOIN) if rank != self._rank}
        finished = {
            r: sum(done for _, done in n.progress.values()) for r, n in notes.items() if n is not None
        }
        before, self._finished = self._finished, finished
        return any(count > before.get(rank, 0) for rank, count in finished.items())

    def _post(self, progress):
        if self._store is not None:
            note = {"time": time.time(), "progress": progress}
            self._store.post(str(self._rank), json.dumps(note))

    def _is_left_alone(self, name, waited):
        """True if this rank has ended its epoch, and another waits for it in a step: both would for ever."""
        if (
            not name.startswith(FIT_MEETING)
            or self._elastic
            or waited <= min(self._deadline, _SECONDS_TO_MEET)
        ):
            return False
        own = self._ledger.progress()
        notes = [self._read(rank) for rank in self._ledger.members(name) if rank != self._rank]
        return any(
            started > finished and 0 < own.get(other, (0, 0))[0] < started
            for note in notes
            if note is not None
            for other, (started, finished) in note.progress.items()
            if other.startswith(_GRADIENTS)
        )

    def _overdue(self, name, run, waited, goes_on):
        try:
            # A store that has lost this rank's own note is out of reach.
            has_board = self._read(self._rank) is not None
            others = [rank for rank in self._ledger.members(name) if rank != self._rank]
            notes = {rank: self._read(rank) for rank in others} if has_board else {}
            behind = [rank for rank, note in notes.items() if _starts(note, name) < run]
            if goes_on and has_board and not behind:
                # All have arrived and this rank has been in others since: it has failed, in a graph, whose
                # marks do not tell. An engine that stalls would have let nothing else through.
                self._ledger.give_up(name)
                return
            # Time for the others to look at the store, to end, and for this rank to hear of it.
            in_time = waited < self._deadline + 3 * self._interval + _SECONDS_TO_END
            if self._elastic and self._store is not None and behind and in_time:
                self._ask(self._store, behind, name, run, waited)
                return
            text = verdict(self._rank, name, run, waited, notes, has_board)
        except Exception:  # whatever happens here, the wait has to end
            text = traceback.format_exc()
        self._end(text)

    def _ask(self, store, ranks, name, run, waited):
        if (name, run) in self._asked:
            return
        self._asked.add((name, run))
        text = (
            f"rank {self._rank} has waited {waited:.0f} s for {named_ranks(ranks)} in collective '{name}', "
            f"step {run}"
        )
        _log.warning("%s; asking %s to end, so that the others go on.", text, named_ranks(ranks))
        for rank in ranks:
            store.post(_request_key(rank), text)

    def _heed(self):
        """Ends this process if another rank has asked for it."""
        request = self._store.read(_request_key(self._rank)) if self._store is not None else None
        if request:
            self._end(f"\nhvdext: ending this process, rank {self._rank}: {request}.\n")

    def _read(self, rank):
        text = self._store.read(str(rank)) if self._store is not None else None
        try:
            note = json.loads(text or "")
        except ValueError:  # none, or cut short
            return None
        return Note(time.time() - note["time"], note["progress"])


def verdict(
    rank: int,
    name: str,
    run: int,
    waited: float,
    notes: Mapping[int, Note | None],
    has_board: bool,
) -> str:
    """Says what `rank` waits for and who has not arrived.

    Args:
        rank: who waits.
        name: the collective.
        run: how often this rank has started it; for gradients, the step.
        waited: seconds.
        notes: the other ranks' notes, None where a rank has never posted one.
        has_board: False if this rank had no way to ask the others.
    """
    lines = [
        f"\nhvdext: rank {rank} has waited {waited:.0f} s in collective '{name}', step {run}; "
        "ending this process."
    ]
    missing, meets = [], name.startswith(FIT_MEETING)
    for other, note in notes.items():
        if note is None:
            missing.append(f"  rank {other} has not arrived: it has never reported")
            continue
        started = _starts(note, name)
        if started < run:
            elsewhere = [place for place, (begun, done) in note.progress.items() if begun > done]
            meets |= any(place.startswith(FIT_MEETING) for place in elsewhere)
            waits = f", and waits in {', '.join(map(repr, elsewhere))}" if elsewhere else ""
            missing.append(
                f"  rank {other} has not arrived: it has started this collective {started} times{waits} "
                f"(last report {note.age:.0f} s ago)"
            )
    if not has_board:
        lines.append("  Which ranks are missing is not known: this rank reaches no key-value store.")
    elif missing:
        lines += missing
    else:
        lines.append("  All ranks have arrived; the engine or the network stalls.")
    if meets and missing:
        lines.append(
            "  One rank has ended its epoch before another. Callbacks that stop on a rank's own metrics, "
            "such as TerminateOnNaN,\n  belong into hvd.callbacks.AsOneProcess([...]), on every rank; with "
            "hvd.callbacks.UnevenBatches\n  ranks may have different numbers of batches."
        )
    lines.append(
        "  All ranks must make the same steps. If the wait is legitimate, raise the deadline: "
        "hvd.init(deadline=seconds) or HVDEXT_DEADLINE=seconds.\n"
    )
    return "\n".join(lines)


def _starts(note: Note | None, name: str) -> int:
    """How often a rank has started a collective, as far as it has told."""
    return note.progress.get(name, (0, 0))[0] if note is not None else 0


def end_process(text: str) -> None:
    """Writes `text` and all stacks, then ends the process."""
    try:
        os.write(2, text.encode())  # not through sys.stderr, whose lock a thread that hangs may hold
        faulthandler.dump_traceback(all_threads=True)
    finally:
        os._exit(EXIT_CODE)


def _request_key(rank: int) -> str:
    return f"end.{rank}"
