"""Exchanges that follow the steps: every rank starts and merges them after the same step."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hvdext.common.background import Background
from hvdext.sync.engine.engine import Engine
from hvdext.sync.engine.transfer import Outcome


@dataclass
class _InFlight:
    """An exchange that runs beside training."""

    start: tf.Tensor
    step: int
    told: list[float]
    errors: list[np.ndarray]  # what the wire had cut off before
    future: Future
    is_cured: bool = False  # this rank's weights have been replaced since it left


class StepwiseEngine(Engine):
    """Starts what is due, lets it run for the delay, merges it.

    All ranks must train equally many steps: they start and merge the same exchanges then.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._in_flight: dict[int, _InFlight] = {}
        self._background: Background | None = None
        self._cured_at = -1  # the latest step at which all ranks have met for a cure
        self._last_exchange: tuple[float, float] = (time.perf_counter(), 0.0)  # when, and seconds waited

    def step(self, steps, samples):
        """As in `Engine`."""
        before = self.trained.steps
        self.trained.steps += steps
        self.trained.samples += samples
        now = self.trained.steps
        for i in [i for i, flight in self._in_flight.items() if flight.step + self._delay(flight) <= now]:
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
        found = super().state() | {"cured_at": np.array(self._cured_at)}
        for i, flight in self._in_flight.items():
            found[f"start_{i}"] = flight.start.numpy()
            found[f"flight_{i}"] = np.array([flight.step, *flight.told])
            found[f"is_cured_{i}"] = np.array(flight.is_cured)
            for j, error in enumerate(flight.errors):
                found[f"error_{j}_of_{i}"] = error
        return found

    def restore(self, found):
        """As in `Engine`."""
        super().restore(found)
        self._in_flight.clear()
        self._cured_at = int(found["cured_at"])
        for i in range(len(self.states)):
            if f"start_{i}" in found:  # it had left and not arrived: it leaves again
                step, *told = map(float, found[f"flight_{i}"])
                self._take_off(i, tf.constant(found[f"start_{i}"]), int(step), told)
                self._in_flight[i].is_cured = bool(found[f"is_cured_{i}"])

    def _delay(self, flight):
        return self.settings.when.delay_at(flight.step)

    def _exchange(self, i):
        if i in self._in_flight:
            self._land(i)
        state = self.states[i]
        start = self._snapshot(i)
        told = [self._weight(state), self.trained.steps, self._overhead(), 0, 0]
        state.turns += 1
        if self.settings.when.delay_at(self.trained.steps):
            self._take_off(i, start, self.trained.steps, told)
            return
        begin = time.perf_counter()
        outcome = self._transferred(i, start, told)
        self._merge(i, start, outcome, self.trained.steps, begin)

    def _take_off(self, i, start, step, told):
        if self._background is None:
            self._background = Background("hvdext.sync")
        errors = [error.numpy() for error in self.states[i].transfer.errors]
        future = self._background.submit(self._transferred, i, start, told)
        self._in_flight[i] = _InFlight(start, step, told, errors, future)

    def _transferred(self, i: int, start: tf.Tensor, told: list[float]) -> Outcome:
        state = self.states[i]
        return state.transfer.run(start, state.turns - 1, told)

    def _land(self, i, only_sound=False):
        flight = self._in_flight[i]
        begin = time.perf_counter()
        outcome = flight.future.result()
        if only_sound and outcome.failing:
            return
        del self._in_flight[i]
        self._merge(i, flight.start, outcome, flight.step, begin, flight.is_cured)

    def _merge(self, i, start, outcome, step, begin, is_cured=False):
        fragment = self.states[i].fragment
        self._check_finite(i, outcome, start)
        mean_norm = None
        if self.settings.when.measures == "divergence":
            centre = 0.0 if fragment.centre is None else fragment.read_centre()
            mean_norm = float(tf.norm(centre + outcome.mean))
        takes_mean = tf.constant(outcome.takes_mean or is_cured)
        fragment.merge(start, outcome.own, outcome.mean, takes_mean)
        is_cured = bool(outcome.failing) and step > self._cured_at and self._cure_all(i, outcome)
        if outcome.takes_mean or is_cured:
            self._cure_optimizer()
        waited = time.perf_counter() - begin
        self._last_exchange = (self._last_exchange[0], self._last_exchange[1] + waited)
        self._merged(i, outcome, step, waited, mean_norm)

    def _cure_all(self, i, outcome) -> bool:
        """Exchanges all fragments for ranks that have failed; returns whether this one has taken any."""
        now = self.trained.steps
        found = self._cure.run(outcome, self.states[i].turns - 1, now, self._snapshot)
        for j, values in found.items():
            self.states[j].fragment.put(values)
            if j in self._in_flight:  # it would bring the difference from values that are gone
                self._in_flight[j].is_cured = True
        # Of exchanges that left before, none tells of a failure that is not cured; all must know that alike.
        if len(outcome.ranks) == self.comm.size:
            self._cured_at = now
        return bool(found)

    def _snapshot(self, i):
        return self.states[i].fragment.snapshot()

    def _overhead(self):
        """The share of the time since the last exchange's start that training has waited."""
        now = time.perf_counter()
        since, waited = self._last_exchange
        self._last_exchange = (now, 0.0)
        return waited / max(now - since, 1e-9)
