"""Finished engines, kept per user so that each is built once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hvdext.engine.target import Target


def cache_folder(target: Target) -> Path:
    """Returns the folder of one engine; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hvdext" / "engine" / target.key


def cached_wheel(target: Target) -> Path | None:
    """Returns the finished wheel of one engine; None if it has not been built."""
    wheels = sorted(cache_folder(target).glob("horovod-*.whl"))
    return wheels[0] if wheels else None


def store(wheel: Path, target: Target) -> Path:
    """Puts a wheel in the cache and returns its place there.

    Two builds of one target may end at the same time: each copies to a name of its own and renames,
    so a reader sees a whole wheel or none.

    Args:
        wheel: the file to copy.
        target: what it was built for.
    """
    folder = cache_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{wheel.name}.{os.getpid()}"
    try:
        shutil.copyfile(wheel, partial)
        os.replace(partial, folder / wheel.name)
    finally:
        partial.unlink(missing_ok=True)
    return folder / wheel.name
