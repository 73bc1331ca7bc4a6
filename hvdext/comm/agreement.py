"""Do all ranks mean the same? Otherwise: the same error on every rank, before any number is exchanged.

A collective whose shapes differ fails, one that a rank never calls hangs, and one whose settings differ
gives wrong numbers without a word. All three become one `ValueError` that says who disagrees about what.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from hvdext.comm.communicator import Communicator
from hvdext.common.wording import named_ranks

_LINES = 20  # differences spelled out; more are counted


def check(
    comm: Communicator, subject: str, facts: Mapping[str, object] | None, problem: str | None = None
) -> None:
    """Compares `facts` over the ranks. Every rank of `comm` must call it, at the same point.

    Args:
        comm: who compares.
        subject: what the facts describe, for the message: "DistributedOptimizer 'adam'".
        facts: what must agree, by name; values are compared by their `repr`. None: this rank has nothing to
            say (it has run out of batches) and hears what the others agree on.
        problem: what is wrong with the facts by themselves.

    Raises:
        ValueError: on every rank alike, if any fact or the subject differs, or they agree on a problem.
    """
    if comm.size == 1:
        if problem is not None:
            raise ValueError(problem)
        return
    mine = None
    if facts is not None:
        mine = {"subject": subject} | {key: repr(value) for key, value in facts.items()}
        mine |= {"error": problem} if problem is not None else {}
    digest = hashlib.sha256(repr(sorted(mine.items())).encode()).hexdigest() if mine else None
    digests = comm.allgather_object((digest, problem), "hvdext.agreement.digest")
    speaking = [i for i, (digest, _) in enumerate(digests) if digest is not None]
    if len({digests[i][0] for i in speaking}) <= 1:
        agreed_problem = digests[speaking[0]][1] if speaking else None
        if agreed_problem is not None:
            raise ValueError(agreed_problem)
        return
    everyone = comm.allgather_object(mine, "hvdext.agreement.facts")
    views = [everyone[i] for i in speaking]
    # The first rank's subject: the message must be the same on every rank.
    raise ValueError(disagreement(views[0]["subject"], views, tuple(comm.ranks[i] for i in speaking)))


def disagreement(subject: str, everyone: list[dict[str, str]], ranks: tuple[int, ...]) -> str:
    """Says which ranks hold which value of every fact that differs.

    Args:
        subject: what the facts describe.
        everyone: each rank's facts, in the order of `ranks`.
        ranks: the global ranks.
    """
    keys = dict.fromkeys(key for facts in everyone for key in facts)
    lines = []
    for key in keys:
        holders = defaultdict(list)
        for rank, facts in zip(ranks, everyone, strict=True):
            holders[facts.get(key, "(missing)")].append(rank)
        if len(holders) > 1:
            views = "; ".join(f"{named_ranks(who)}: {value}" for value, who in holders.items())
            lines.append(f"  {key}: {views}")
    shown = lines[:_LINES]
    if len(lines) > _LINES:
        shown.append(f"  and {len(lines) - _LINES} more")
    return "\n".join([f"The ranks disagree about {subject}:", *shown])
