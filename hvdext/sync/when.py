"""When ranks exchange: schedules over the steps that a rank has trained.

A schedule is asked with intervals of steps, (before, now], since one call of a training function may make
several steps (`steps_per_execution`). It answers with the fragments whose turn lies in the interval; it never
looks at anything but steps, settings and numbers that all ranks have agreed on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_number, require_positive, require_whole


class Schedule:
    """The turns of one run. The base class never has one."""

    def due(self, before: int, now: int) -> list[int]:
        """The fragments to exchange because training has gone from step `before` to step `now`."""
        return []

    def due_at_epoch_end(self) -> list[int]:
        """The fragments to exchange at the end of an epoch."""
        return []

    def due_at_end(self) -> list[int]:
        """The fragments to exchange when training ends."""
        return []

    def learn(self, now: int, measured: float) -> None:
        """Takes in what an exchange that began at step `now` has measured, the same number on all ranks."""

    def state(self) -> list[int]:
        """What a resumed run must know."""
        return []

    def restore(self, state: Iterable[int]) -> None:
        """Takes up a `state` again."""


class When:
    """Base of the answers to "when".

    Attributes:
        delay: steps of training between an exchange's start and its merge.
        is_asynchronous: True if exchanges do not follow the steps.
        max_staleness: of an asynchronous answer, steps without an exchange after which training waits.
    """

    delay: int = 0
    max_staleness: int | None = None
    is_asynchronous = False

    @property
    def measures(self) -> str | None:
        """None, or what `Schedule.learn` is to be told: "divergence" or "overhead"."""
        return None

    def check_fragments(self, fragments: int) -> None:
        """Refuses more fragments than there are turns for."""

    def delay_at(self, step: int) -> int:
        """The delay of an exchange that starts at `step`, in steps."""
        return self.delay

    def schedule(self, fragments: int) -> Schedule:
        """A fresh schedule for so many fragments."""
        return Schedule()


@suggests_keywords
@dataclass(frozen=True)
class Every(When):
    """Every fragment once in `steps` steps, the fragments evenly apart.

    Fragment p of P (from 0) is exchanged at the steps t above warmup_steps with

        (t - warmup_steps) mod steps = floor((p + 1) * steps / P) mod steps

    which with one fragment are the multiples of `steps` (local SGD), and with several the staggered turns of
    Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512).

    Args:
        steps: between two exchanges of one fragment, at least 1 and at least the number of fragments.
        delay: steps of training that go on while the exchange runs in the background, 0 to `steps`; the
            result is merged after the last of them, before another exchange starts. 0: training waits for it.
        warmup_steps: for so many steps from the first on, everything is exchanged at every step, without
            delay (post-local SGD, Lin et al. 2020, arXiv:1808.07217); the first interval begins after them.

    Raises:
        ValueError: if an argument breaks its rule.
    """

    steps: int
    delay: int = 0
    warmup_steps: int = 0

    def __post_init__(self):
        _settle(self, "steps", require_whole("steps", self.steps, 1))
        _settle(self, "delay", require_whole("delay", self.delay, 0))
        _settle(self, "warmup_steps", require_whole("warmup_steps", self.warmup_steps, 0))
        if self.delay > self.steps:
            raise ValueError(f"`delay` must be at most `steps`, {self.steps}. Received: delay={self.delay}.")

    def check_fragments(self, fragments: int) -> None:
        """As in `When`."""
        if fragments > self.steps:
            raise ValueError(
                "`steps` must be at least the number of fragments, so that each has a turn of its own. "
                f"Received: steps={self.steps} with {fragments} fragments."
            )

    def delay_at(self, step: int) -> int:
        """As in `When`."""
        return 0 if step <= self.warmup_steps else self.delay

    def schedule(self, fragments: int) -> Schedule:
        """As in `When`."""
        return _EverySchedule(self, fragments)


class _EverySchedule(Schedule):
    def __init__(self, when: Every, fragments: int):
        self._when = when
        self._offsets = [(p + 1) * when.steps // fragments for p in range(fragments)]

    def due(self, before, now):
        if before < self._when.warmup_steps:
            return list(range(len(self._offsets)))
        every, first = self._when.steps, self._when.warmup_steps
        turns = [((before - first - o) // every, (now - first - o) // every) for o in self._offsets]
        return [p for p, (earlier, so_far) in enumerate(turns) if so_far > earlier]


@dataclass(frozen=True)
class EveryEpoch(When):
    """One exchange at the end of every epoch; with several fragments, of the next one in turn."""

    def schedule(self, fragments: int) -> Schedule:
        """As in `When`."""
        return _EpochSchedule(fragments)


class _EpochSchedule(Schedule):
    def __init__(self, fragments: int):
        self._fragments = fragments
        self._epochs = 0

    def due_at_epoch_end(self):
        self._epochs += 1
        return [(self._epochs - 1) % self._fragments]

    def state(self):
        return [self._epochs]

    def restore(self, state):
        (self._epochs,) = state


@dataclass(frozen=True)
class AtEnd(When):
    """One exchange of everything when training ends."""

    def schedule(self, fragments: int) -> Schedule:
        """As in `When`."""
        return _EndSchedule(fragments)


class _EndSchedule(Schedule):
    def __init__(self, fragments: int):
        self._fragments = fragments

    def due_at_end(self):
        return list(range(self._fragments))


@suggests_keywords
@dataclass(frozen=True)
class Always(When):
    """All the time, by a thread in the background; training does not wait for it.

    What an exchange changes is merged after the training step during which it came in. The ranks need not
    make equally many steps, nor run in step: a slow rank does not hold up the others' training.

    Args:
        max_staleness: steps that training may make since the last exchange came in; then it waits for the
            next one. None: it never waits.

    Raises:
        ValueError: if `max_staleness` is below 1.
    """

    max_staleness: int | None = None
    is_asynchronous = True

    def __post_init__(self):
        if self.max_staleness is not None:
            _settle(self, "max_staleness", require_whole("max_staleness", self.max_staleness, 1))


@suggests_keywords
@dataclass(frozen=True)
class Adaptive(When):
    """An interval that follows a measurement, towards a target.

    After each exchange the interval H becomes, within [min, max] and by no more than a factor of 2 at once,

        H * target / measured      with `divergence`: far apart, exchange more often
        H * measured / target      with `overhead`: expensive, exchange less often

    Both keep to their target where divergence and the share of time are proportional to H and 1/H. Periodic
    averaging with an adaptive period: Jiang and Agrawal 2020, arXiv:2007.06134; Wang and Joshi 2019,
    arXiv:1810.08313.

    Args:
        min: smallest interval in steps, at least 1; the first one.
        max: largest interval in steps, at least `min`.
        divergence: target of the ranks' root-mean-square distance to their mean, relative to the norm of
            the mean, just before an exchange; above 0.
        overhead: target of the share of time that training spends waiting for exchanges, between 0 and 1;
            the slowest rank's counts.
        delay: as in `Every`, but below `min`.

    Raises:
        ValueError: if an argument breaks its rule, or not exactly one target is given.
    """

    min: int
    max: int
    divergence: float | None = None
    overhead: float | None = None
    delay: int = 0

    def __post_init__(self):
        divergence, overhead = self.divergence, self.overhead
        _settle(self, "min", require_whole("min", self.min, 1))
        _settle(self, "max", require_whole("max", self.max, self.min))
        _settle(self, "delay", require_whole("delay", self.delay, 0))
        if self.delay >= self.min:
            raise ValueError(f"`delay` must be below `min`, {self.min}. Received: delay={self.delay}.")
        if (divergence is None) == (overhead is None):
            raise ValueError(
                "Exactly one of `divergence` and `overhead` must be given. "
                f"Received: divergence={divergence!r}, overhead={overhead!r}."
            )
        if divergence is not None:
            _settle(self, "divergence", require_positive("divergence", divergence))
        if overhead is not None:
            share = require_number("overhead", overhead, lambda target: 0 < target < 1, "lie between 0 and 1")
            _settle(self, "overhead", share)

    @property
    def measures(self) -> str:
        """As in `When`."""
        return "divergence" if self.divergence is not None else "overhead"

    def check_fragments(self, fragments: int) -> None:
        """As in `When`."""
        if fragments > self.min:
            raise ValueError(
                "`min` must be at least the number of fragments, so that each has a turn of its own. "
                f"Received: min={self.min} with {fragments} fragments."
            )

    def next_interval(self, interval: int, measured: float) -> int:
        """The interval after one of `interval` steps whose exchange has `measured` so much."""
        if self.divergence is not None:
            factor = self.divergence / measured if measured > 0 else 2.0
        else:
            assert self.overhead is not None
            factor = measured / self.overhead
        factor = sorted((0.5, factor, 2.0))[1]
        return sorted((self.min, round(interval * factor), self.max))[1]

    def schedule(self, fragments: int) -> Schedule:
        """As in `When`."""
        return _AdaptiveSchedule(self, fragments)


class _AdaptiveSchedule(Schedule):
    """Turns go round the fragments, interval / fragments steps apart."""

    def __init__(self, when: Adaptive, fragments: int):
        self._when = when
        self._fragments = fragments
        self.interval = when.min
        self._turns = 0
        self._last = 0  # the step of the latest turn

    def due(self, before, now):
        if now < self._last + max(1, round(self.interval / self._fragments)):
            return []
        self._last = now
        self._turns += 1
        return [(self._turns - 1) % self._fragments]

    def learn(self, now, measured):
        self.interval = self._when.next_interval(self.interval, measured)

    def state(self):
        return [self.interval, self._turns, self._last]

    def restore(self, state):
        self.interval, self._turns, self._last = state


def _settle(answer, name, value):
    """Sets a field of a frozen answer to Python's own number: ranks compare answers by how they print."""
    object.__setattr__(answer, name, value)
