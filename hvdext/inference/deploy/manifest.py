"""What a model's files are: their manifest, and their bytes in chunks. Needs neither TensorFlow nor Horovod.

A model is described by its files' relative names, sizes and SHA-256, and named by the digest of that. It
travels as one row of bytes, file after file, cut into chunks.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

CHUNK_BYTES = 8 << 20
_READ_BYTES = 1 << 20

# What a model is called in a cache, by its kind.
_NAMES = {"keras": "model.keras", "weights": "model.weights.h5", "saved_model": "saved_model"}


class DamagedModel(OSError):
    """Bytes that are not those that the manifest promises."""


@dataclass(frozen=True)
class File:
    """One file of a model.

    Attributes:
        name: relative to the model's folder, with "/" between folders; of a single file, its name in a
            cache.
        size: bytes.
        sha256: hexadecimal digits.
    """

    name: str
    size: int
    sha256: str

    def __post_init__(self):
        path = PurePosixPath(self.name) if isinstance(self.name, str) else PurePosixPath()
        inside = path.parts and not path.is_absolute() and not {"..", "."} & set(self.name.split("/"))
        if not inside or str(path) != self.name or "\0" in self.name or "\\" in self.name:
            raise ValueError(f"A file's name must be a path within the model. Received: {self.name!r}.")
        if type(self.size) is not int or self.size < 0:
            raise ValueError(f"A file's size must be a number of bytes. Received: {self.size!r}.")
        digits = self.sha256 if isinstance(self.sha256, str) else ""
        if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
            raise ValueError(f"A file's SHA-256 must be 64 hexadecimal digits. Received: {self.sha256!r}.")


@dataclass(frozen=True)
class Manifest:
    """What a model's files are, whatever they are called where they come from.

    Attributes:
        kind: "keras" (a `.keras` file), "weights" (`.weights.h5`) or "saved_model" (a folder).
        files: in the order of their names.
    """

    kind: str
    files: tuple[File, ...]

    def __post_init__(self):
        if self.kind not in _NAMES:
            raise ValueError(f"A manifest's kind must be one of {list(_NAMES)}. Received: {self.kind!r}.")
        names = [file.name for file in self.files]
        if not names or names != sorted(set(names)):
            raise ValueError(f"A manifest must list at least one file, each once. Received: {names}.")
        if self.kind != "saved_model" and names != [_NAMES[self.kind]]:
            raise ValueError(f"A manifest of kind {self.kind!r} must list one file. Received: {names}.")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of kind, names, sizes and the files' SHA-256, in hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def name(self) -> str:
        """What the model is called in a cache."""
        return _NAMES[self.kind]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def chunks(self, size: int = CHUNK_BYTES) -> int:
        """In how many chunks of `size` bytes (the last may be shorter) the files travel."""
        return -(-self.size // size)

    def to_json(self) -> str:
        """As text, the same for equal manifests."""
        return json.dumps({"kind": self.kind, "files": [asdict(file) for file in self.files]}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` has written.

        Raises:
            ValueError: if it is none, or one with names that lead out of the model's folder.
        """
        try:
            read: dict[str, Any] = json.loads(text)
            return cls(read["kind"], tuple(File(**file) for file in read["files"]))
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"A manifest must be JSON with kind and files. Received: {error}.") from error


def kind_of(path: str | os.PathLike) -> str:
    """The kind of the model at `path`, by its name and contents: see `Manifest`.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is no model.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "There is no model", str(path))
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "saved_model"
        raise ValueError(
            "`path` must be a .keras file, a .weights.h5 file or a SavedModel, which is a folder with "
            f"saved_model.pb. Received: the folder {str(path)!r} without one."
        )
    if path.suffix == ".keras":
        return "keras"
    if path.name.endswith(".weights.h5"):
        return "weights"
    raise ValueError(
        "`path` must be a .keras file, a .weights.h5 file or a SavedModel's folder. "
        f"Received: {str(path)!r}. Save an older model anew: model.save('model.keras')."
    )


def describe(path: str | os.PathLike) -> Manifest:
    """The manifest of the model at `path`; reads all of it.

    Raises:
        OSError: if it is not there or cannot be read.
        ValueError: if it is no model, or a folder that holds links or other things than files.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind != "saved_model":
        return Manifest(kind, (_file(path, _NAMES[kind]),))
    return Manifest(kind, tuple(_file(path / name, name) for name in names_below(path)))


def chunks(path: str | os.PathLike, manifest: Manifest, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of the model at `path`, file after file, in `manifest.chunks(size)` chunks.

    Raises:
        DamagedModel: if a file is not as long as the manifest says; its SHA-256 is for the receiver to check.
        OSError: if it cannot be read.
    """
    waiting = bytearray()
    for file in manifest.files:
        with open(place_of(Path(path), manifest, file), "rb") as source:
            left = file.size
            while left:
                data = source.read(min(left, size - len(waiting)))
                if not data:
                    break
                left -= len(data)
                waiting += data
                if len(waiting) == size:
                    yield bytes(waiting)
                    waiting.clear()
            if left or source.read(1):
                raise DamagedModel(
                    f"{file.name!r} has changed while it was read: not {file.size} bytes long."
                )
    if waiting:
        yield bytes(waiting)


def place_of(path: Path, manifest: Manifest, file: File) -> Path:
    """Where `file` is, of the model at `path`."""
    return path / file.name if manifest.kind == "saved_model" else path


def _file(path: Path, name: str) -> File:
    return File(name, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as source:
        while data := source.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def names_below(folder: Path) -> list[str]:
    """The files' relative names, sorted; empty folders do not count."""
    names = []
    for place in folder.rglob("*"):
        if place.is_symlink() or not (place.is_file() or place.is_dir()):
            raise ValueError(f"A SavedModel's folder must hold files only. Received: {str(place)!r}.")
        if place.is_file():
            names.append(place.relative_to(folder).as_posix())
    return sorted(names)
