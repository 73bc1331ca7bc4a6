"""Exchanges that follow the steps: every rank starts and merges them after the same step."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hvdext.common.background import Background
from hvdext.sync.engine.engine import Engine
from hvdext.sync.engine.report import Report
from hvdext.sync.engine.transfer import Outcome


@dataclass
class _InFlight:
    """An exchange that runs beside training: from the step it starts at to the one it is merged at."""

    start: tf.Tensor
    report: Report
    errors: list[np.ndarray]  # what the wire had cut off before
    future: Future
    is_recovered: bool = False  # this rank's weights have been replaced since it left


class StepwiseEngine(Engine):
    """Starts what is due, lets it run for the delay, merges it.

    All ranks must train equally many steps: they start and merge the same exchanges then.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._turns = [0] * len(self.states)  # exchanges started, by fragment
        self._in_flight: dict[int, _InFlight] = {}
        self._background: Background | None = None  # from the first exchange beside training to its end
        self._recovered_at = -1  # the latest step at which all ranks have met for a recovery
        self._last_exchange: tuple[float, float] = (time.perf_counter(), 0.0)  # when, and seconds waited

    def turns_of(self, i):
        """As in `Engine`."""
        return self._turns[i]

    def step(self, steps, samples):
        """As in `Engine`."""
        before = self.trained.steps
        self.trained.steps += steps
        self.trained.samples += samples
        now = self.trained.steps
        for i in [
            i for i, flight in self._in_flight.items() if flight.report.step + self._delay(flight) <= now
        ]:
            self._land(i)
        for i in self.schedule.due(before, now):
            self._exchange(i)

    def end_epoch(self):
        """As in `Engine`."""
        for i in self.schedule.due_at_epoch_end():
            self._exchange(i)

    def settle(self):
        """As in `Engine`."""
        if self.settings.when.measures is None:  # else all ranks would have to agree on the measurement
            for i in list(self._in_flight):
                self._land(i, only_sound=True)

    def land(self):
        """As in `Engine`."""
        flights = list(self._in_flight)
        for i in flights:
            self._land(i)
        return bool(flights)

    def abandon(self):
        """As in `Engine`."""
        self._in_flight.clear()

    def end(self):
        """As in `Engine`."""
        for i in self.schedule.due_at_end():
            self._exchange(i)
        if self._background is not None:
            self._background.stop()
            self._background = None

    def state(self):
        """As in `Engine`."""
        found = super().state() | {"cured_at": np.array(self._recovered_at)}
        for i, flight in self._in_flight.items():
            found[f"start_{i}"] = flight.start.numpy()
            found[f"flight_{i}"] = np.array([flight.report.step, *flight.report.saved()])
            found[f"is_cured_{i}"] = np.array(flight.is_recovered)
            for j, error in enumerate(flight.errors):
                found[f"error_{j}_of_{i}"] = error
        return found

    def restore(self, found):
        """As in `Engine`."""
        super().restore(found)
        self._in_flight.clear()
        self._recovered_at = int(found["cured_at"])
        for i in range(len(self.states)):
            self._turns[i] = int(found[f"turns_{i}"][0])
            if f"start_{i}" in found:  # it had left and not arrived: it leaves again
                _, *report = found[f"flight_{i}"]
                self._take_off(i, tf.constant(found[f"start_{i}"]), Report.of_saved(report))
                self._in_flight[i].is_recovered = bool(found[f"is_cured_{i}"])

    def _delay(self, flight):
        return self.settings.when.delay_at(flight.report.step)

    def _exchange(self, i):
        if i in self._in_flight:
            self._land(i)
        start = self._snapshot(i)
        weight = self._weight(self.states[i])
        report = Report(weight=weight, step=self.trained.steps, overhead=self._overhead())
        self._turns[i] += 1
        if self.settings.when.delay_at(report.step):
            self._take_off(i, start, report)
            return
        begin = time.perf_counter()
        outcome = self._transferred(i, start, report)
        self._merge(i, start, outcome, report.step, begin)

    def _take_off(self, i, start, report):
        if self._background is None:
            self._background = Background("hvdext.sync")
        errors = [error.numpy() for error in self.states[i].transfer.errors]
        future = self._background.submit(self._transferred, i, start, report)
        self._in_flight[i] = _InFlight(start, report, errors, future)

    def _transferred(self, i: int, start: tf.Tensor, report: Report) -> Outcome:
        return self.states[i].transfer.run(start, self._turns[i] - 1, report)

    def _land(self, i, only_sound=False):
        with tf.profiler.experimental.Trace("hvdext.sync.land", fragment=i):
            flight = self._in_flight[i]
            begin = time.perf_counter()
            outcome = flight.future.result()
            if only_sound and outcome.failing:
                return
            del self._in_flight[i]
            self._merge(i, flight.start, outcome, flight.report.step, begin, flight.is_recovered)

    def _merge(self, i, start, outcome, step, begin, is_recovered=False):
        fragment = self.states[i].fragment
        self._check_finite(i, self._turns[i] - 1, outcome, start)
        mean_norm = None
        if self.settings.when.measures == "divergence":
            centre = 0.0 if fragment.centre is None else fragment.read_centre()
            mean_norm = float(tf.norm(centre + outcome.mean))
        takes_mean = tf.constant(outcome.takes_mean or is_recovered)
        fragment.merge(start, outcome.own, outcome.mean, takes_mean)
        is_new = bool(outcome.failing) and step > self._recovered_at
        has_recovered = is_new and self._recover_all(i, outcome)
        if outcome.takes_mean or has_recovered:
            self._recover_optimizer()
        waited = time.perf_counter() - begin
        self._last_exchange = (self._last_exchange[0], self._last_exchange[1] + waited)
        self._merged(i, outcome, step, waited, mean_norm)

    def _recover_all(self, i, outcome) -> bool:
        """Exchanges all fragments for ranks that have failed; returns whether this one has taken any."""
        now = self.trained.steps
        found = self._recovery.run(outcome, self._turns[i] - 1, now, self._snapshot)
        for j, values in found.items():
            self.states[j].fragment.put(values)
            if j in self._in_flight:  # it would bring the difference from values that are gone
                self._in_flight[j].is_recovered = True
        # Of exchanges that left before, none tells of a failure that is not mended; all must know that alike.
        if len(outcome.ranks) == self.comm.size:
            self._recovered_at = now
        return bool(found)

    def _snapshot(self, i):
        return self.states[i].fragment.snapshot()

    def _overhead(self):
        """The share of the time since the last exchange's start that training has waited."""
        now = time.perf_counter()
        since, waited = self._last_exchange
        self._last_exchange = (now, 0.0)
        return waited / max(now - since, 1e-9)
