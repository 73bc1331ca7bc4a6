"""All scripted edits to Horovod's source, and how they are made.

Each edit is one exact piece of text in one file. It must occur there exactly once;
otherwise nothing is written and the build stops, because a fix that is quietly left out
is a hang that nobody can explain later.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

from hvdext.engine.fixes.edits import Edit, Fix, FixError
from hvdext.engine.fixes.in_pieces import IN_PIECES
from hvdext.engine.fixes.local_transport import LOCAL_TRANSPORT
from hvdext.engine.fixes.stock import (
    LINK_OF_SETS,
    SETS_OF_SURVIVORS,
    STALL_CHECK,
    STATEFUL_OPS,
    XLA_HEADERS,
)
from hvdext.engine.fixes.wake_on_arrival import WAKE_ON_ARRIVAL

FIXES = (
    STALL_CHECK,
    STATEFUL_OPS,
    SETS_OF_SURVIVORS,
    LINK_OF_SETS,
    WAKE_ON_ARRIVAL,
    LOCAL_TRANSPORT,
    IN_PIECES,
    XLA_HEADERS,
)
PROTECTIONS = tuple(fix for fix in FIXES if fix.without)


def apply(source: Path, fixes: tuple[Fix, ...] = FIXES) -> None:
    """Makes all edits in an unpacked source tree, or none of them.

    Args:
        source: the folder that holds Horovod's `setup.py`.
        fixes: what to apply.

    Raises:
        FixError: if any edit's old text does not occur exactly once; no file has then
            been changed.
    """
    edits = [edit for fix in fixes for edit in fix.edits]
    texts = {name: _read(source, name) for name in {edit.file for edit in edits}}
    problems = [
        f"{edit.file}: {edit.old.strip()!r} must occur exactly once. Received: "
        f"{texts[edit.file].count(edit.old)} occurrences."
        for edit in edits
        if texts[edit.file].count(edit.old) != 1
    ]
    problems += _repeated(edits)
    if problems:
        raise FixError(
            "The source fixes do not fit this Horovod source; nothing was changed and nothing "
            "will be built:\n  " + "\n  ".join(problems)
        )
    for edit in edits:
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    for name, text in [*texts.items(), *(file for fix in fixes for file in fix.files)]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")


def digest(fixes: tuple[Fix, ...] = FIXES) -> str:
    """Returns a hexadecimal digest that changes with any edit and any new file."""
    edits = [(fix.name, edit.file, edit.old, edit.new) for fix in fixes for edit in fix.edits]
    return hashlib.sha256(repr([*edits, *(fix.files for fix in fixes)]).encode()).hexdigest()


def _read(source: Path, name: str) -> str:
    try:
        return (source / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FixError(
            f"The source fixes need the file {name!r}, which is not in {source}; nothing was "
            "changed and nothing will be built."
        ) from None


def _repeated(edits: list[Edit]) -> list[str]:
    """Two edits of the same text: the second one would find nothing to replace."""
    counts = Counter((edit.file, edit.old) for edit in edits)
    return [
        f"{file}: {old.strip()!r} must be edited by one fix only. Received: {count} edits."
        for (file, old), count in counts.items()
        if count > 1
    ]
