"""Names without the numbers that Keras gives by counting what a process has made."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERED = re.compile(r"^(.*?)(?:_(\d+))?$")


def renumbered(names: Sequence[str]) -> list[str]:
    """The names or paths, with numbers that count from 0 what is among them, in the order of Keras' numbers.

    A process that has made another model before has `dense_3` and `dense_4` where others have `dense` and
    `dense_1`; both become `dense` and `dense_1`. Which comes first in the list stays to be seen.

    Args:
        names: such as `dense_1`, or paths such as `sequential/dense_1/kernel`.
    """
    numbers: dict[tuple[int, str], set[int]] = {}
    split = [[_split(part) for part in name.split("/")] for name in names]
    for parts in split:
        for place, (base, number) in enumerate(parts):
            numbers.setdefault((place, base), set()).add(number)
    order = {key: {number: i for i, number in enumerate(sorted(found))} for key, found in numbers.items()}
    return [
        "/".join(_joined(base, order[place, base][n]) for place, (base, n) in enumerate(p)) for p in split
    ]


def _split(part):
    match = _NUMBERED.match(part)
    assert match is not None, part
    base, number = match.groups()
    return base, -1 if number is None else int(number)


def _joined(base, number):
    return f"{base}_{number}" if number else base
