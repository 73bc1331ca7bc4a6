"""Exchanges all the time: a thread of each rank exchanges without end, training takes up what has come in.

The threads of all ranks are in step with each other, not with training, and need nothing from it: they read
the weights whenever they start an exchange, also while their rank validates, waits or has finished. So a rank
that is slow, or somewhere else, keeps nobody waiting. What an exchange changes is a difference that training
adds to its weights after its current step; nothing that was learned in between is lost.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from hvdext.common.background import Background
from hvdext.sync.engine.engine import Engine, Trained
from hvdext.sync.engine.report import FINISHED, STOPS, Report

_PATIENCE = 0.05  # seconds that the thread waits for a step, not to exchange the same values twice
_LOOK = 1.0  # seconds between two looks whether the thread still lives


class _Loop:
    """The thread that exchanges: from a training's start until every rank's training has ended or failed.

    Args:
        exchange: called in the thread with this object; returns when all ranks' trainings have ended.

    Attributes:
        wants_stop: whether this rank asks all to end their training.
        has_finished: whether this rank's training has ended, or failed.
    """

    def __init__(self, exchange: Callable[[_Loop], None]):
        self.wants_stop = False
        self.has_finished = False
        self._thread = Background("hvdext.sync")
        self._future = self._thread.submit(exchange, self)

    @property
    def is_over(self) -> bool:
        """True if it exchanges no more, since all have finished or it has failed."""
        return self._future.done()

    def raise_failure(self) -> None:
        """Raises what has gone wrong in the thread, if anything has."""
        if self.is_over:
            self._future.result()

    def join(self) -> None:
        """Waits until every rank's training has ended; raises what has gone wrong in the thread."""
        try:
            self._future.result()
        finally:
            self._thread.stop()


class AsynchronousEngine(Engine):
    """One exchange after the other, fragment by fragment, in a thread."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._turn = 0  # exchanges so far, of all fragments
        self._changes: list[tf.Tensor | None] = [None] * len(self.states)  # to be added to the weights
        self._recovered: list[tf.Tensor | None] = [None] * len(self.states)  # to be put in their place
        self._lock = threading.Lock()  # holds for reading the weights with their changes, and adding these
        self._changed = threading.Condition()
        self._arrived = 0  # exchanges
        self._steps_at_arrival = 0
        self._loop: _Loop | None = None  # from `start` to `land`
        self.stop_requested = False  # by any rank of the latest training

    def start(self) -> None:
        """Begins to exchange; every rank must call it."""
        self._end_abandoned_loop()
        self.stop_requested = False
        self._steps_at_arrival = self.trained.steps
        # A resumed run: no rank was saved at the same turn as another.
        self._turn = max(self.comm.allgather_object(self._turn, "hvdext.sync.turn"))
        self.share_centres()
        self._loop = _Loop(self._exchange_until_all_have_finished)

    def request_stop(self) -> None:
        """Asks all ranks to end their training; each finds `stop_requested` true after some exchange."""
        if self._loop is not None:
            self._loop.wants_stop = True

    def turns_of(self, i):
        """As in `Engine`."""
        return -(-(self._turn - i) // len(self.states))

    def abandon(self):
        """As in `Engine`."""
        if self._loop is not None:
            self._loop.has_finished = True
        self._changes = [None] * len(self.states)
        self._recovered = [None] * len(self.states)

    def step(self, steps, samples):
        """As in `Engine`."""
        self.trained.steps += steps
        self.trained.samples += samples
        with self._changed:
            self._changed.notify_all()
        self._raise_failure()
        self._take_up(blocking=False)
        limit = self.settings.when.max_staleness
        if limit is not None and self.trained.steps - self._steps_at_arrival >= limit:
            self._wait_for_arrival()

    def end_epoch(self):
        """Nothing: the exchanges go on."""

    def land(self):
        """As in `Engine`."""
        if self._loop is None:
            return False
        begin = time.perf_counter()
        self._loop.has_finished = True
        with self._changed:
            self._changed.notify_all()
        self._loop.join()
        self._loop = None
        has_changed = any(values is not None for values in [*self._changes, *self._recovered])
        self._take_up(blocking=True)
        self.totals.waited += time.perf_counter() - begin
        return has_changed

    def state(self):
        """As in `Engine`."""
        with self._lock:
            return super().state() | {"turn": np.array(self._turn)}

    def restore(self, found):
        """As in `Engine`."""
        if self._loop is not None:  # the ranks' threads have agreed on the rest already
            self.trained = Trained(*map(int, found["trained"]))
            return
        super().restore(found)
        self._turn = int(found["turn"])

    # -- on training's side ------------------------------------------------------------------------------

    def _end_abandoned_loop(self):
        """Of a training that has failed: it ends once all ranks have come here."""
        if self._loop is not None:
            self._loop.has_finished = True
            with contextlib.suppress(Exception):
                self._loop.join()
            self._loop = None

    def _raise_failure(self):
        if self._loop is not None:
            self._loop.raise_failure()

    def _take_up(self, blocking):
        """Adds to the weights what has come in; without blocking, only if the thread is not reading them."""
        if not self._lock.acquire(blocking=blocking):
            return
        try:
            for state, change, recovered in zip(self.states, self._changes, self._recovered, strict=True):
                if recovered is not None:
                    state.fragment.put(recovered)
                elif change is not None:
                    state.fragment.add(change)
            if any(values is not None for values in self._recovered):
                self._recover_optimizer()
            self._changes = [None] * len(self.states)
            self._recovered = [None] * len(self.states)
        finally:
            self._lock.release()

    def _wait_for_arrival(self):
        begin = time.perf_counter()
        before = self._arrived
        with self._changed:
            while not self._changed.wait_for(lambda: self._arrived > before, _LOOK):
                self._raise_failure()
                if self._loop is None or self._loop.is_over:
                    break
        self.totals.waited += time.perf_counter() - begin
        self._take_up(blocking=True)

    # -- in the thread -----------------------------------------------------------------------------------

    def _exchange_until_all_have_finished(self, loop):
        all_have_finished = False
        while not all_have_finished:
            number, i = divmod(self._turn, len(self.states))
            state, step = self.states[i], self.trained.steps
            start = self._snapshot(i)
            report = Report(
                weight=self._weight(state), step=step, stops=loop.wants_stop, finished=loop.has_finished
            )
            outcome = state.transfer.run(start, number, report)
            self._check_finite(i, number, outcome, start)
            self._book(i, outcome, start, step)
            if outcome.failing:
                self._recover_all(outcome, number, step)
            self.stop_requested = self.stop_requested or bool(np.any(outcome.table[:, STOPS]))
            # A group that has met on its own goes on: the others wait for it in the next turn over all.
            all_have_met = len(outcome.ranks) == self.comm.size
            all_have_finished = all_have_met and bool(np.all(outcome.table[:, FINISHED]))
            self._turn += 1
            self._rest(loop, step)

    def _snapshot(self, i):
        """The weights as they will be once what has come in is added."""
        with self._lock:
            if self._recovered[i] is not None:
                return self._recovered[i]
            values, change = self.states[i].fragment.snapshot(), self._changes[i]
        return values if change is None else values + change

    def _book(self, i, outcome, start, step):
        takes_mean = tf.constant(outcome.takes_mean)
        after = self.states[i].fragment.after(start, outcome.own, outcome.mean, takes_mean)
        with self._lock:
            before = self._changes[i]
            if outcome.takes_mean or self._recovered[i] is not None:
                self._recovered[i], self._changes[i] = after, None
            else:
                self._changes[i] = after - start if before is None else before + (after - start)
        self._merged(i, outcome, step, 0.0, None)
        with self._changed:
            self._arrived += 1
            self._steps_at_arrival = self.trained.steps
            self._changed.notify_all()

    def _recover_all(self, outcome, number, step):
        """Exchanges all fragments for ranks that have failed; training takes up all of them together."""
        found = self._recovery.run(outcome, number, step, self._snapshot)
        with self._lock:
            for i, values in found.items():
                self._recovered[i], self._changes[i] = values, None

    def _rest(self, loop, step):
        """Waits for a step of training, but not for long: other ranks wait for this thread."""
        with self._changed:
            self._changed.wait_for(lambda: self.trained.steps > step or loop.has_finished, _PATIENCE)
