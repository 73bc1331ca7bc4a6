"""In which order the ranks of a pipeline compute micro-batches and exchange them. Pure: lists of actions.

A model is cut into chunks. Chunk c runs on rank c mod p, so that with as many chunks as ranks each holds
one, and with v times as many each holds v ("interleaved"). A batch is cut into m micro-batches. F is a
forward pass of one chunk on one micro-batch, B its backward pass, which takes about twice as long.

    gpipe        all F, then all B: the activations of m micro-batches are kept
                 (Huang 2019, arXiv:1811.06965)
    1f1b         F and B in turns as soon as possible: at most p - rank are kept
                 (Narayanan 2019, arXiv:1806.03377)
    eager-1f1b   1f1b with forward passes made early, so that ranks compute while messages are
                 on their way: at most 2 (p - rank) - 1 are kept (Zhuang 2022, arXiv:2211.05322)
    interleaved  1f1b over v chunks per rank: the start and end take 1/v of the time
                 (Narayanan 2021, arXiv:2104.04473)

The ranks wait for each other at the start and the end of a batch, which leaves them working for
m / (m + (p - 1)/v) of the time at best (v = 1 but in the last one).

**Why no order here can hang.** All actions of all ranks have one common order: that of the clock of an
imagined run in which F takes 1 and B takes 2 units and messages take none. Each rank acts in this order. A
message needs both its ranks at once; the earliest action that is not done has everything that it depends on
behind it on every rank, so that it can be done, whether or not a rank works on anything else while it waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvdext.common.checks import is_whole

SCHEDULES = ("gpipe", "1f1b", "eager-1f1b", "interleaved")

_SECONDS = {"forward": 1, "backward": 2}  # of the imagined run


@dataclass(frozen=True, order=True)
class Compute:
    """A pass of one chunk on one micro-batch.

    Attributes:
        kind: "forward" or "backward".
        chunk: 0 to chunks - 1.
        microbatch: 0 to microbatches - 1.
    """

    kind: str
    chunk: int
    microbatch: int


@dataclass(frozen=True, order=True)
class Transfer:
    """A message between the ranks of two neighbouring chunks.

    Attributes:
        kind: "activations", from chunk `boundary` to the next one, or "gradients", back.
        boundary: the first of the two chunks.
        microbatch: 0 to microbatches - 1.
        source: the rank that sends.
        target: the rank that receives.
    """

    kind: str
    boundary: int
    microbatch: int
    source: int
    target: int


Action = Compute | Transfer


def ideal_efficiency(ranks: int, microbatches: int, chunks_per_rank: int = 1) -> float:
    """The part of the time that ranks of equal speed work when messages take none: m / (m + (p - 1)/v)."""
    return microbatches / (microbatches + (ranks - 1) / chunks_per_rank)


def problem_of(schedule: str, ranks: int, chunks: int, microbatches: int) -> str | None:
    """What is wrong with these settings, as the message of an error; None if nothing is.

    One rank on its own may hold any number of chunks under each schedule.
    """
    if schedule not in SCHEDULES:
        return (
            f"`schedule` must be one of {', '.join(map(repr, SCHEDULES))}. Received: schedule={schedule!r}."
        )
    if not is_whole(microbatches, 1):
        return f"`microbatches` must be an integer of at least 1. Received: microbatches={microbatches!r}."
    if ranks == 1:
        return None
    if schedule == "interleaved":
        if chunks % ranks:
            return (
                "`plan` must have a multiple of the pipeline's ranks as places for schedule='interleaved'. "
                f"Received: {chunks} places on {ranks} ranks."
            )
        if microbatches % ranks:
            return (
                "`microbatches` must be a multiple of the pipeline's ranks for schedule='interleaved'. "
                f"Received: microbatches={microbatches} on {ranks} ranks."
            )
    elif chunks != ranks:
        return (
            f"`plan` must have as many places as the pipeline has ranks for schedule={schedule!r} "
            "('interleaved' takes a multiple). "
            f"Received: {chunks} places on {ranks} ranks."
        )
    return None


def computes(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> list[Compute]:
    """The passes of one rank in its order; settings as `problem_of` lets them through."""
    forward, backward = _passes(schedule, rank, ranks, chunks, microbatches)
    if schedule == "gpipe":
        return forward + backward
    if ranks == 1:
        ahead = chunks - 1
    elif schedule == "1f1b":
        ahead = ranks - 1 - rank
    else:  # "eager-1f1b" is "interleaved" with one chunk per rank
        # A micro-batch comes back to this rank's last chunk after 2 (p - 1 - rank) passes of others.
        ahead = 2 * (ranks - 1 - rank) + (chunks // ranks - 1) * ranks
    if ranks == 1:
        return [p for k in range(microbatches) for p in _of_microbatch(forward, backward, k)]
    ahead = min(ahead, len(forward))
    order = forward[:ahead]
    for later, earlier in zip(forward[ahead:], backward, strict=False):
        order += [later, earlier]
    return order + backward[len(forward) - ahead :]


def programs(
    schedule: str,
    ranks: int,
    chunks: int,
    microbatches: int,
    *,
    training: bool = True,
    gradients: Sequence[bool] | None = None,
) -> list[list[Action]]:
    """What each rank does for one batch, in its order.

    Args:
        schedule: one of `SCHEDULES`.
        ranks: of the pipeline.
        chunks: of the model.
        microbatches: of a batch.
        training: False: forward passes only.
        gradients: for each boundary between chunks whether gradients go back over it; None: over all.
    """
    orders = [computes(schedule, rank, ranks, chunks, microbatches) for rank in range(ranks)]
    if not training:
        orders = [[one for one in order if one.kind == "forward"] for order in orders]
    back = [True] * (chunks - 1) if gradients is None else list(gradients)
    starts = clock(orders, chunks)
    timed: list[list[tuple]] = [[] for _ in range(ranks)]
    for rank, order in enumerate(orders):
        for one in order:
            # Messages come before the passes that begin at the same time.
            timed[rank].append((starts[one], 1, one))
            message = _message_after(one, ranks, chunks, back)
            if message is not None and message.source != message.target:
                end = starts[one] + _SECONDS[one.kind]
                for end_rank in (message.source, message.target):
                    timed[end_rank].append((end, 0, message))
    return [[action for _, _, action in sorted(actions)] for actions in timed]


def clock(orders: Sequence[Sequence[Compute]], chunks: int) -> dict[Compute, int]:
    """When each pass begins in the imagined run, in its units.

    Args:
        orders: for each rank its passes.
        chunks: of the model.

    Raises:
        RuntimeError: if the orders wait for each other in a circle.
    """
    starts: dict[Compute, int] = {}
    done = [0] * len(orders)
    free = [0] * len(orders)
    progress = True
    while progress:
        progress = False
        for rank, order in enumerate(orders):
            while done[rank] < len(order):
                one = order[done[rank]]
                needs = _needs(one, chunks)
                if not all(need in starts for need in needs):
                    break
                ends = [starts[need] + _SECONDS[need.kind] for need in needs]
                starts[one] = max([free[rank], *ends])
                free[rank] = starts[one] + _SECONDS[one.kind]
                done[rank] += 1
                progress = True
    if sum(done) < sum(map(len, orders)):
        waiting = [order[n] for n, order in zip(done, orders, strict=True) if n < len(order)]
        raise RuntimeError(f"The orders of the ranks wait for each other: {waiting}.")
    return starts


def kept(program: Sequence[Action]) -> int:
    """How many forward passes wait for their backward pass at most, on the rank of `program`."""
    now = most = 0
    for action in program:
        if isinstance(action, Compute):
            now += 1 if action.kind == "forward" else -1
            most = max(most, now)
    return most


def _passes(schedule, rank, ranks, chunks, microbatches):
    """One rank's forward and backward passes, each in their order."""
    mine = list(range(rank, chunks, ranks))
    # Interleaved: p micro-batches go through the first chunk, then they go through the second, and so on.
    group = ranks if schedule == "interleaved" else 1
    forward, backward = [], []
    for first in range(0, microbatches, group):
        some = range(first, first + group)
        forward += [Compute("forward", chunk, k) for chunk in mine for k in some]
        backward += [Compute("backward", chunk, k) for chunk in reversed(mine) for k in some]
    return forward, backward


def _of_microbatch(forward, backward, microbatch):
    return [one for one in [*forward, *backward] if one.microbatch == microbatch]


def _needs(one: Compute, chunks: int) -> list[Compute]:
    if one.kind == "forward":
        return [Compute("forward", one.chunk - 1, one.microbatch)] if one.chunk else []
    needs = [Compute("forward", one.chunk, one.microbatch)]
    if one.chunk < chunks - 1:
        needs.append(Compute("backward", one.chunk + 1, one.microbatch))
    return needs


def _message_after(one: Compute, ranks: int, chunks: int, gradients: Sequence[bool]) -> Transfer | None:
    """The message that a pass gives rise to."""
    if one.kind == "forward":
        if one.chunk == chunks - 1:
            return None
        source, target = one.chunk % ranks, (one.chunk + 1) % ranks
        return Transfer("activations", one.chunk, one.microbatch, source, target)
    if one.chunk == 0 or not gradients[one.chunk - 1]:
        return None
    source, target = one.chunk % ranks, (one.chunk - 1) % ranks
    return Transfer("gradients", one.chunk - 1, one.microbatch, source, target)
