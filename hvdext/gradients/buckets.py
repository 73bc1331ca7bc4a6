"""Which gradients travel together: buckets, in the order in which backward produces them.

Backward produces gradients from the last layer to the first. A bucket leaves as soon as its own gradients
are there, so the exchange of the last layers runs while the first ones are still being computed. Small
buckets start early but cost a round trip each (Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704,
section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BUCKET_BYTES = 16 * 2**20


def buckets(sizes: Sequence[int], kinds: Sequence[object], limit: int = BUCKET_BYTES) -> list[list[int]]:
    """Cuts gradients into buckets, last gradient first.

    Args:
        sizes: bytes of each gradient, in the order of the variables (first layer first).
        kinds: what may not be mixed within a bucket (the dtype), one per gradient.
        limit: bytes after which a bucket is full; a larger gradient is a bucket of its own.

    Returns:
        Lists of indices into `sizes`, in the order in which the buckets become ready.
    """
    done: list[list[int]] = []
    open_buckets: dict[object, tuple[list[int], int]] = {}
    for index in reversed(range(len(sizes))):
        members, filled = open_buckets.get(kinds[index], ([], 0))
        if members and filled + sizes[index] > limit:
            done.append(members)
            members, filled = [], 0
        open_buckets[kinds[index]] = ([*members, index], filled + sizes[index])
    return done + [members for members, _ in open_buckets.values()]


def grouped(count: int, kinds: Sequence[object], groups: int | Sequence[Sequence[int]]) -> list[list[int]]:
    """Cuts gradients into the groups that the user asked for (Horovod's `groups`), last gradient first.

    Args:
        count: number of gradients.
        kinds: what may not be mixed within a group, one per gradient.
        groups: a number of groups of nearly equal length, or lists of indices; an index in no list is
            a group of its own.

    Returns:
        Lists of indices, in the order in which the groups become ready.
    """
    if not count:
        return []
    backwards = list(reversed(range(count)))
    if isinstance(groups, int):
        number = min(groups, count)
        cuts = [count * i // number for i in range(number + 1)]
        wanted = [backwards[a:b] for a, b in pairwise(cuts)]
    else:
        named = {index for group in groups for index in group}
        wanted = [sorted(group, reverse=True) for group in groups]
        wanted += [[index] for index in backwards if index not in named]
        wanted.sort(key=lambda group: -group[0])
    split: list[list[int]] = []
    for group in wanted:
        by_kind: dict[object, list[int]] = {}
        for index in group:
            by_kind.setdefault(kinds[index], []).append(index)
        split += by_kind.values()
    return split
