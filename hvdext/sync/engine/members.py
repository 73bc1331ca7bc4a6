"""Who takes part in a sync: all ranks look together, before any of them waits for those that it names."""

from __future__ import annotations

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.sync.whom import Group, Whom

_SUBJECT = "hvd.callbacks.ParameterSync"

# The note that this rank has looked. Once per job only: later the groups go their own ways, and one may begin
# more syncs than another.
_LOOKED = "hvdext.sync: members have looked"


def members(comm: Communicator, whom: Whom) -> Communicator:
    """The ranks among which this one exchanges.

    Args:
        comm: all ranks of the job. Each of them must call it for its first sync.
        whom: this rank's answer.

    Raises:
        ValueError: if this rank is not in the set it names, or the set is not registered; with the first
            sync on every rank alike, and also if only some name a group, or groups overlap.
    """
    if comm.size == 1:
        return comm
    found, problem = None, None
    try:
        found = _members(comm, whom)
    except (ValueError, RuntimeError) as error:
        problem = error
    if _LOOKED not in comm.ledger.notes:
        _look(comm, whom, found, problem)
        comm.ledger.notes[_LOOKED] = True
    if found is None:
        assert problem is not None
        raise problem
    return found


def _members(comm, whom):
    if not isinstance(whom, Group):
        return comm
    whom.check(comm)
    return comm.subset(whom.process_set.ranks)


def _look(comm, whom, found, problem):
    ranks = None if found is None else (isinstance(whom, Group), found.ranks)
    mine = (ranks, repr(whom), None if problem is None else str(problem))
    everyone = comm.allgather_object(mine, "hvdext.sync.members")
    problems = [text for _, _, text in everyone if text is not None]
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems))) from problem
    sets = {found for found, _, _ in everyone}
    if len({is_group for is_group, _ in sets}) > 1 or sum(len(ranks) for _, ranks in sets) > comm.size:
        views = [{"whom": text} for _, text, _ in everyone]
        raise ValueError(
            "`whom` must be a Group on all ranks or on none, and groups must be equal or have no rank in "
            f"common. {agreement.disagreement(_SUBJECT, views, comm.ranks)}"
        )
