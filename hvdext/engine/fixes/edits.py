"""What a scripted edit to Horovod's source is."""

from __future__ import annotations

from dataclasses import dataclass

from hvdext.engine.errors import EngineError


class FixError(EngineError):
    """A scripted edit does not fit the source it was written for."""


@dataclass(frozen=True)
class Edit:
    """Replaces one piece of text, which occurs exactly once, in one file.

    Attributes:
        file: path inside the unpacked source, with forward slashes.
        old: the text to find.
        new: the text to put in its place.
    """

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fix:
    """The edits that belong together, and what they prevent.

    Attributes:
        name: how the built engine records that it has this fix.
        why: what goes wrong in stock Horovod.
        edits: all of them are made, or none.
        files: new ones, path inside the unpacked source and text.
        without: one sentence for users of an engine that lacks this protection; empty for a fix
            that only makes the source compile.
        controllers: which of Horovod's ways to bring ranks together the fix concerns.
    """

    name: str
    why: str
    edits: tuple[Edit, ...]
    files: tuple[tuple[str, str], ...] = ()
    without: str = ""
    controllers: tuple[str, ...] = ("gloo", "mpi")
