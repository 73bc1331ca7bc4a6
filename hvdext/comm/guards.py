"""How often ranks that train together look whether they still hold the same, and what they do if not."""

from __future__ import annotations

from dataclasses import dataclass

from hvdext.comm.communicator import Communicator
from hvdext.common.checks import require_choice, require_whole


@dataclass(frozen=True)
class Guards:
    """What `hvd.init` was told about them.

    Attributes:
        check_every: updates from one look to the next; the first is before the first update of every `fit`.
            0: never.
        on_divergence: "raise": an error on every rank. "broadcast": all go on with the first rank's values,
            which says so.

    Raises:
        ValueError: if one of them breaks its rule.
    """

    check_every: int = 200
    on_divergence: str = "raise"

    def __post_init__(self) -> None:
        require_whole("check_every", self.check_every, 0)
        require_choice("on_divergence", self.on_divergence, ("raise", "broadcast"))

    def keep_for(self, comm: Communicator) -> None:
        """They hold for the ranks of `comm` as long as these stay joined."""
        comm.ledger.notes[Guards] = self


def guards_of(comm: Communicator) -> Guards:
    """What holds for the ranks of `comm`."""
    return comm.ledger.notes.get(Guards, Guards())
