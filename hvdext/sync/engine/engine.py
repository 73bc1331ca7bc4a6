"""Asks the five questions: what every engine has, whether it follows the steps or runs all the time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.collectives.finite import failing_ranks, is_finite
from hvdext.comm.communicator import Communicator
from hvdext.common.log import warn
from hvdext.common.wording import named_ranks
from hvdext.keras_tools.optimizers import innermost
from hvdext.sync.engine.fragment import Fragment
from hvdext.sync.engine.recovery import Recovery
from hvdext.sync.engine.report import FINITE, OVERHEAD
from hvdext.sync.engine.transfer import Outcome, Transfer
from hvdext.sync.pieces import Piece
from hvdext.sync.settings import Settings


@dataclass(frozen=True)
class Exchanged:
    """One exchange, as listeners are told of it.

    Attributes:
        fragment: its number.
        pieces: what it consists of.
        step: the step it started at.
        staleness: steps between its start and its merge.
        seconds: from start to end.
        waited: seconds that training waited for it.
        outcome: what it brought.
    """

    fragment: int
    pieces: list[Piece]
    step: int
    staleness: int
    seconds: float
    waited: float
    outcome: Outcome


@dataclass
class Totals:
    """What all exchanges so far have cost.

    Attributes:
        exchanges: how many have been merged.
        waited: seconds that training waited for exchanges.
        overlapped: seconds that exchanges ran beside training.
    """

    exchanges: int = 0
    waited: float = 0.0
    overlapped: float = 0.0


@dataclass
class Trained:
    """How far a rank has got, in steps and samples since it began."""

    steps: int = 0
    samples: int = 0


@dataclass
class FragmentState:
    """A fragment with its exchanges."""

    fragment: Fragment
    transfer: Transfer
    counted: Trained = field(default_factory=Trained)  # when the latest one started


class Engine:
    """The fragments of one model, and how far training has got.

    Args:
        name: part of the collectives' names.
        settings: the five answers.
        fragments: what is exchanged, the same on all ranks.
        comm: the ranks that take part.
        measures: whether the ranks' distances are measured.
        told: called with an `Exchanged` after each merge.
        optimizer: what this rank trains with, if known.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        fragments: list[list[Piece]],
        comm: Communicator,
        measures: bool,
        told: Callable[[Exchanged], None],
        optimizer: keras.optimizers.Optimizer | None = None,
    ):
        self.settings = settings
        self._name = name
        self._optimizer = optimizer
        self.comm = comm
        self.trained = Trained()
        self.totals = Totals()
        self.schedule = settings.when.schedule(len(fragments))
        self._told = told
        self.states = []
        keeps_centre = settings.keeps_centre or (measures and settings.whom.shares_reference)
        for i, pieces in enumerate(fragments):
            fragment = Fragment(pieces, settings.rule.among(comm.size), keeps_centre)
            path = f"hvdext.sync.{name}.{i}"
            transfer = Transfer(path, fragment, settings.wire, comm, settings.whom, measures)
            self.states.append(FragmentState(fragment, transfer))
        self._recovery = Recovery(
            f"hvdext.sync.{name}", [state.fragment for state in self.states], settings, comm
        )
        self._has_warned = False

    def train_with(self, optimizer: keras.optimizers.Optimizer | None) -> None:
        """From now on this rank trains with another optimizer, or with one that nobody knows."""
        self._optimizer = optimizer

    def share_centres(self) -> None:
        """Gives all ranks the first one's common values, and what moves them; every rank must call it."""
        for i, state in enumerate(self.states):
            outer = state.fragment.outer
            common = [*(state.fragment.centre or []), *(outer.variables if outer is not None else [])]
            if common:
                values = self.comm.broadcast(common, 0, f"hvdext.sync.centre.{i}")
                for variable, value in zip(common, values, strict=True):
                    variable.assign(value)

    # -- what the two kinds of engine do differently ---------------------------------------------------

    def turns_of(self, i: int) -> int:
        """How many turns to be exchanged fragment `i` has had."""
        raise NotImplementedError

    def step(self, steps: int, samples: int) -> None:
        """This rank has trained so many steps more, on so many samples."""
        raise NotImplementedError

    def end_epoch(self) -> None:
        """An epoch has ended."""
        raise NotImplementedError

    def settle(self) -> None:
        """The last epoch has ended, here at least: finishes what can be without a word to other ranks."""

    def land(self) -> bool:
        """Finishes the exchanges on their way; returns whether that may have changed weights."""
        raise NotImplementedError

    def end(self) -> None:
        """Training has ended, and everything has landed: makes the exchanges that are due at the end."""

    def abandon(self) -> None:
        """Forgets the exchanges on their way: the training that they belong to has failed."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        """What a resumed run needs to go on as this one would."""
        found = {
            "settings": np.frombuffer(repr(self.settings.facts()).encode(), np.uint8),
            "trained": np.array([self.trained.steps, self.trained.samples]),
            "schedule": np.array(self.schedule.state(), np.int64),
        }
        for i, state in enumerate(self.states):
            found[f"turns_{i}"] = np.array([self.turns_of(i), state.counted.steps, state.counted.samples])
            for name, variable in _variables(state).items():
                found[f"{name}_{i}"] = variable.numpy()
        return found

    def restore(self, found: dict[str, np.ndarray]) -> None:
        """Takes up a `state` again.

        Raises:
            ValueError: if it is the state of other fragments.
        """
        settings = found["settings"].tobytes().decode()
        if settings != repr(self.settings.facts()):
            raise ValueError(
                "The checkpoint must have been written with the same sync settings, "
                f"{self.settings.facts()}. Received: {settings}."
            )
        values = {}
        for i, state in enumerate(self.states):
            for name, variable in _variables(state).items():
                value = found.get(f"{name}_{i}")
                if value is None and name.startswith("centre") and not self.settings.keeps_centre:
                    continue  # kept for measurements only: these begin anew
                if value is None or value.shape != tuple(variable.shape):
                    received = "nothing" if value is None else f"shape {value.shape}"
                    raise ValueError(
                        "The checkpoint must have been written for the same model and number of ranks. "
                        f"Received: {received} for {name}_{i} of shape {tuple(variable.shape)}."
                    )
                values[name, i] = value
        self.trained = Trained(*map(int, found["trained"]))
        self.schedule.restore(map(int, found["schedule"]))
        for i, state in enumerate(self.states):
            _, *counted = map(int, found[f"turns_{i}"])
            state.counted = Trained(*counted)
            for name, variable in _variables(state).items():
                if (name, i) in values:
                    variable.assign(values[name, i])

    # -- parts of an exchange --------------------------------------------------------------------------

    def _weight(self, state: FragmentState) -> float:
        """How much this rank counts in the exchange that starts now."""
        by = self.settings.rule.weight_by
        weight = 1.0
        if by is not None:
            weight = float(getattr(self.trained, by) - getattr(state.counted, by))
        state.counted = Trained(self.trained.steps, self.trained.samples)
        return weight

    def _check_finite(self, i: int, number: int, outcome: Outcome, start: tf.Tensor) -> None:
        """All ranks know from the outcome whether anybody's values are not finite.

        Args:
            i: of which fragment.
            number: of the exchange's turn.
            outcome: of the exchange.
            start: this rank's values when it started.

        Raises:
            ValueError: on all ranks alike, if the settings say so or no rank at all has finite values. Some
                of the ranks that have met on their own wait for those that have.
        """
        failing = outcome.failing
        if not failing:
            return
        nobody_helps = len(failing) == len(outcome.ranks) == self.comm.size
        if self.settings.on_nonfinite == "skip_rank" and not nobody_helps:
            self._warn_of(failing, outcome)
            return
        fragment, mine = self.states[i].fragment, []
        if outcome.takes_mean:
            mine = fragment.labels_of(~np.isfinite(fragment.outgoing(start).numpy()))
        meeting = self.settings.whom.turn(self.comm, number).comm
        everyone = meeting.allgather_object(mine, f"hvdext.sync.{self._name}.{i}.nonfinite")
        lines = failing_ranks(outcome.ranks, everyone)
        raise ValueError(
            "Weights that are not finite must not be spread (on_nonfinite="
            f"{self.settings.on_nonfinite!r}). Received, at step {self.trained.steps}:\n  "
            + "\n  ".join(lines)
        )

    def _warn_of(self, failing, outcome):
        """Once, on the first of the ranks that have met."""
        if outcome.place == 0 and not self._has_warned:
            self._has_warned = True
            when = f"at step {self.trained.steps} of rank {outcome.ranks[0]}"
            warn(
                f"Weights of {named_ranks(failing)} are not finite {when}. "
                "The others go on with their mean, which is taken there as well (on_nonfinite='skip_rank'). "
                "If it happens again, that is not mentioned."
            )

    def _recover_optimizer(self) -> None:
        """Clears what is not finite from the slots of a rank that has taken the others' mean.

        With moments that are not finite its next step would spoil the weights again.
        """
        if self._optimizer is None:
            return
        for variable in innermost(self._optimizer).variables:
            if not is_finite(variable):
                value = tf.convert_to_tensor(variable)
                variable.assign(tf.where(tf.math.is_finite(value), value, tf.zeros_like(value)))

    def _agreed(self, measured: float) -> float:
        """The largest of all ranks' measurements: not all of them have met in this turn."""
        mine = tf.constant([measured], tf.float64)
        return float(np.max(self.comm.allgather(mine, f"hvdext.sync.{self._name}.measured").numpy()))

    def _merged(self, i: int, outcome: Outcome, step: int, waited: float, mean_norm: float | None) -> None:
        """Keeps the books after a merge."""
        self.totals.exchanges += 1
        self.totals.waited += waited
        self.totals.overlapped += max(0.0, outcome.seconds - waited)
        measure = self.settings.when.measures
        if measure == "overhead":
            self.schedule.learn(step, self._agreed(float(np.max(outcome.table[:, OVERHEAD]))))
        elif measure == "divergence":
            self.schedule.learn(step, self._agreed(divergence(outcome, mean_norm)))
        staleness = self.trained.steps - step
        self._told(
            Exchanged(i, self.states[i].fragment.pieces, step, staleness, outcome.seconds, waited, outcome)
        )


def divergence(outcome: Outcome, mean_norm: float | None) -> float:
    """The ranks' root-mean-square distance to their mean, relative to the mean's norm.

    Args:
        outcome: of an exchange that has measured distances.
        mean_norm: Euclidean norm of the mean.
    """
    assert outcome.squares is not None
    assert mean_norm is not None
    finite = outcome.table[:, FINITE] > 0
    if not finite.any():
        return 0.0
    distance = float(np.sqrt(np.mean(np.sum(outcome.squares[finite], axis=1))))
    return distance / mean_norm if mean_norm > 0 else 0.0


def _variables(state: FragmentState) -> dict[str, Any]:
    """What a fragment has to remember, by name."""
    found: dict[str, Any] = {}
    fragment = state.fragment
    for j, variable in enumerate(fragment.centre or []):
        found[f"centre_{j}_of"] = variable
    for j, variable in enumerate(fragment.outer.variables if fragment.outer is not None else []):
        found[f"outer_{j}_of"] = variable
    for j, variable in enumerate(state.transfer.errors):
        found[f"error_{j}_of"] = variable
    return found
