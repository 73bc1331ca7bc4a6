"""The models that a host keeps, by digest, so that each comes once. Needs neither TensorFlow nor Horovod.

<cache>/<digest>/model.keras            a file has a name that depends on its kind only
<cache>/<digest>/saved_model/...        a folder
<cache>/.partial/<number>/              being received; goes into place by one rename, whole and checked
<cache>/.locks/<digest>                 held by the process that receives for its host
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hvdext.inference.deploy.manifest import DamagedModel, File, Manifest, names_below, place_of, sha256_of

LOCK_SECONDS = 600.0
_POLL_SECONDS = 0.05


def default_cache() -> Path:
    """The folder that holds this user's models: HVDEXT_CACHE, or hvdext/models in the user's cache."""
    chosen = os.environ.get("HVDEXT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdext" / "models"


class Store:
    """The models that a host keeps.

    ```python
    with store.lock(manifest):  # one process of the host receives, the others wait
        path = store.find(manifest)
        if path is None:
            with store.receive(manifest) as writer:
                for chunk in ...:
                    writer.write(chunk)
            path = writer.path
    ```

    Args:
        folder: where they are; None: `default_cache()`. Everything in it may be deleted at any time.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder is not None else default_cache()

    def find(self, manifest: Manifest) -> Path | None:
        """The model's path, after a look at every byte of it; None if it is not there or damaged."""
        path = self.path_of(manifest)
        try:
            if manifest.kind == "saved_model" and names_below(path) != [f.name for f in manifest.files]:
                return None
            for file in manifest.files:
                place = place_of(path, manifest, file)
                if place.stat().st_size != file.size or sha256_of(place) != file.sha256:
                    return None
        except (OSError, ValueError):
            return None
        return path

    def path_of(self, manifest: Manifest) -> Path:
        """Where the model is, or would be."""
        return self.folder / manifest.digest / manifest.name

    @contextlib.contextmanager
    def lock(self, manifest: Manifest, timeout: float = LOCK_SECONDS) -> Iterator[None]:
        """Context that only one process (or thread) of the host is in at a time, for each model.

        Args:
            manifest: the model.
            timeout: seconds to wait.

        Raises:
            TimeoutError: if another process stays in it for longer; the message has its number.
        """
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / manifest.digest, "a+") as file:  # stays: whoever deleted it would break the lock
            _wait_for(file, timeout)
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()}")
            file.flush()
            yield

    def receive(self, manifest: Manifest) -> Writer:
        """A writer for the model's bytes; a context manager, which puts the model in place at its end.

        Raises:
            OSError: if the disk has no room for it, or the folder cannot be written.
        """
        partial = self.folder / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(partial)
        free = shutil.disk_usage(self.folder).free
        if free < manifest.size:
            raise OSError(
                errno.ENOSPC,
                f"The model has {manifest.size:,} bytes and the disk of its cache {free:,} left",
                str(self.folder),
            )
        return Writer(self, manifest, partial)


class Writer:
    """Takes a model's bytes in order and checks them; see `Store.receive`.

    Left with an exception, or before all bytes are there, it leaves nothing behind.

    Attributes:
        path: where the model is, once the context has ended.
    """

    def __init__(self, store: Store, manifest: Manifest, partial: Path):
        self.path = store.path_of(manifest)
        self._manifest = manifest
        self._folder = partial / secrets.token_hex(8)
        self._mark: IO[str] | None = None  # open and locked while the folder is in use
        self._files = iter(manifest.files)
        self._file: File | None = None
        self._target: IO[bytes] | None = None
        self._left = 0
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes | memoryview) -> None:
        """Takes the next bytes, any number of them.

        Raises:
            DamagedModel: if a file's SHA-256 is not that of the manifest, or there are too many bytes.
            OSError: if they cannot be written.
        """
        self._begin()
        view = memoryview(chunk).cast("B")
        while len(view):
            if self._file is None or self._target is None:
                raise DamagedModel(f"{len(view)} bytes too many have come for the model.")
            part, view = view[: self._left], view[self._left :]
            self._target.write(part)
            self._hash.update(part)
            self._left -= len(part)
            if not self._left:
                self._close_file()
                self._next_file()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *exc_info) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._clean_up()

    def _begin(self):
        """Makes the folder; not before the first byte, so that entering the context cannot fail."""
        if self._mark is not None:
            return
        self._mark = open(self._folder.with_suffix(".lock"), "w")  # noqa: SIM115 - see above
        fcntl.flock(self._mark, fcntl.LOCK_EX)
        self._folder.mkdir()
        self._next_file()

    def _finish(self):
        self._begin()
        if self._file is not None:
            raise DamagedModel(
                f"{self._file.name!r} has not come to its end: {self._left} bytes are missing."
            )
        entry = self.path.parent
        entry.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                os.rename(self._folder, entry)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            # A damaged model, or one that another job has received at the same time: ours is checked.
            old = self._folder.with_suffix(".old")
            with contextlib.suppress(FileNotFoundError):
                os.rename(entry, old)
            shutil.rmtree(old, ignore_errors=True)

    def _clean_up(self):
        if self._target is not None:
            self._target.close()
        if self._mark is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            Path(self._mark.name).unlink(missing_ok=True)
            self._mark.close()

    def _next_file(self):
        """Opens the next file that has bytes; those without are whole at once."""
        for file in self._files:
            place = place_of(self._folder / self.path.name, self._manifest, file)
            place.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._left, self._hash = file, file.size, hashlib.sha256()
            self._target = open(place, "wb")  # noqa: SIM115 - closed by _close_file
            if self._left:
                return
            self._close_file()
        self._file = self._target = None

    def _close_file(self):
        assert self._file is not None
        assert self._target is not None
        self._target.close()
        if self._hash.hexdigest() != self._file.sha256:
            raise DamagedModel(
                f"{self._file.name!r} is damaged: its SHA-256 is {self._hash.hexdigest()}, "
                f"not {self._file.sha256}."
            )


def _wait_for(file: IO[str], timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                holder = file.read() or "another process"
                raise TimeoutError(
                    f"A model has not been received within {timeout:g} s by {holder}, which holds "
                    f"{file.name!r}."
                ) from None
            time.sleep(_POLL_SECONDS)


def _remove_abandoned(partial: Path) -> None:
    """Removes what processes that were killed have left: nobody holds their marks."""
    for mark in partial.glob("*.lock"):
        try:
            with open(mark) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for suffix in ("", ".old"):
                    shutil.rmtree(mark.with_suffix(suffix), ignore_errors=True)
                mark.unlink(missing_ok=True)
        except OSError:
            continue
