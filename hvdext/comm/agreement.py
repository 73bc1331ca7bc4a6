"""Do all ranks mean the same? Otherwise: the same error on every rank, before any number is exchanged.

A collective whose shapes differ fails, one that a rank never calls hangs, and one whose settings differ
gives wrong numbers without a word. All three become one `MismatchError` that says who disagrees about what.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.mismatch import mismatch
from hvdext.comm.pickling import pickled, unpickled
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
        MismatchError: on every rank alike, if any fact or the subject differs.
        ValueError: on every rank alike, if they agree on a problem.
    """
    if comm.size == 1:
        if problem is not None:
            raise ValueError(problem)
        return
    mine = None
    if facts is not None:
        mine = _told(subject, facts) | ({"error": problem} if problem is not None else {})
    digest = _digest(mine).hex() if mine else None
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
    raise mismatch(disagreement(views[0]["subject"], views, tuple(comm.ranks[i] for i in speaking)))


def check_in_graph(
    comm: Communicator, subject: str, facts: Mapping[str, object], name: str
) -> list[tf.Operation]:
    """Compares `facts` whenever the graph being built runs: ranks need not trace it at the same time.

    Args:
        comm: who compares.
        subject: as for `check`.
        facts: as for `check`.
        name: part of the collectives' names, which no other comparison of the graph has.

    Returns:
        What must have run before the numbers travel; nothing eagerly. A run whose facts differ fails on every
        rank, with `tf.errors.InvalidArgumentError` and the words of `check`.
    """
    if comm.size == 1 or tf.executing_eagerly():
        return []
    mine = _told(subject, facts)
    digest = np.frombuffer(_digest(mine), np.uint8)
    everyone = comm.allgather(tf.constant(digest[np.newaxis]), f"{name}.digest")

    def complain(gathered):
        views = unpickled(gathered)
        raise ValueError(disagreement(views[0]["subject"], views, comm.ranks))

    def differ():
        gathered = comm.allgather(tf.constant(pickled(mine)), f"{name}.facts")
        return tf.numpy_function(complain, [gathered], tf.bool)

    alike = tf.reduce_all(everyone == everyone[0])
    return [tf.cond(alike, lambda: tf.constant(True), differ).op]


def _told(subject, facts):
    return {"subject": subject} | {key: repr(value) for key, value in facts.items()}


def _digest(told):
    return hashlib.sha256(repr(sorted(told.items())).encode()).digest()


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
