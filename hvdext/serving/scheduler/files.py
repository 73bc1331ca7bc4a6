"""Whether a path means the same files to two ranks: on one host, a model need not travel."""

from __future__ import annotations

from pathlib import Path

from hvdext.inference.deploy.manifest import Manifest, describe

Identity = list[list[int]]


def look_at(path: Path) -> tuple[Manifest, Identity]:
    """The manifest of the model at `path`, and which files these were.

    Raises:
        OSError: if it cannot be read, or has changed meanwhile.
        ValueError: if it is no model.
    """
    identity = identity_of(path)
    manifest = describe(path)
    if identity_of(path) != identity:
        raise OSError(f"{path} has changed while it was read")
    return manifest, identity


def identity_of(path: Path) -> Identity:
    """Each file's number, size and time of change; empty if there are none."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    try:
        stats = [file.stat() for file in files if file.is_file()]
    except OSError:
        return []
    return [[stat.st_ino, stat.st_size, stat.st_mtime_ns] for stat in stats]
