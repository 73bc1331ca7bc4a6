"""Gives a rank whose weights are not finite all of the others' at once.

Of several fragments the one whose turn it is would not help: the rank's next step, made with the others,
would spoil it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.sync.engine.fragment import Fragment
from hvdext.sync.engine.report import Report
from hvdext.sync.engine.transfer import Outcome, Transfer
from hvdext.sync.settings import Settings
from hvdext.sync.wire import Wire


class Recovery:
    """The exchange of all fragments, which changes nothing on a rank whose weights are finite.

    Args:
        name: of its collectives, "hvdext.sync...".
        fragments: all of a sync.
        settings: the five answers.
        comm: the ranks that take part.
    """

    def __init__(self, name: str, fragments: Sequence[Fragment], settings: Settings, comm: Communicator):
        self._name = name
        self._fragments = fragments
        self._settings = settings
        self._comm = comm
        self._transfers: list[Transfer] = []  # made when they are needed, which most trainings never do

    def run(
        self, outcome: Outcome, number: int, step: int, snapshot: Callable[[int], tf.Tensor]
    ) -> dict[int, tf.Tensor]:
        """Exchanges all fragments; every rank that has met in `outcome` must call it, as all know from there.

        Args:
            outcome: of an exchange in which some ranks' values were not finite.
            number: of that exchange's turn: the same ranks meet again.
            step: how many steps this rank has trained.
            snapshot: returns the values of the fragment of that number, now.

        Returns:
            What this rank has to put into its fragments, by their numbers: all of them if it had failed
            before, otherwise those that are not finite now. Nothing where one fragment is all there is, or
            nobody is sound.
        """
        if len(self._fragments) == 1 or len(outcome.failing) == len(outcome.ranks):
            return {}
        found = {}
        for i, (fragment, transfer) in enumerate(zip(self._fragments, self._made(), strict=True)):
            result = transfer.run(snapshot(i), number, Report(weight=1, step=step))
            if outcome.takes_mean or result.takes_mean:
                found[i] = fragment.target(result.mean)
        return found

    def _made(self):
        if not self._transfers:
            # Errors kept back belong to what all ranks take.
            wire, whom = Wire(self._settings.wire.format), self._settings.whom
            self._transfers = [
                Transfer(f"{self._name}.{i}.cure", fragment, wire, self._comm, whom, measures=False)
                for i, fragment in enumerate(self._fragments)
            ]
        return self._transfers
