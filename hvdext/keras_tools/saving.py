"""Reads parts of the files that Keras writes: some layers' weights, assets, an optimizer's variables."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import keras
from keras.src.saving import saving_lib
from keras.src.utils import file_utils

_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_ASSETS = "assets"
# Of the header in front of a member in an archive.
_LENGTHS_AT, _HEADER_BYTES = 26, 30


def uncompiled_model(file: str | os.PathLike) -> keras.Model:
    """The model that a `.keras` file describes, with first values: not compiled, nothing of the file read.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it describes none.
    """
    with zipfile.ZipFile(file) as archive:
        config = json.loads(archive.read(_CONFIG))
    config["compile_config"] = None
    return keras.saving.deserialize_keras_object(config, safe_mode=True)


def read_weights(
    model: keras.Model, file: str, skipped: Sequence[Any], *, skip_mismatch: bool = False
) -> None:
    """As `model.load_weights`, but for some layers, of which nothing is read.

    Args:
        model: built.
        file: a `.keras` or `.weights.h5` file.
        skipped: the layers, each with all that is in it.
        skip_mismatch: as for `Model.load_weights`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it does not fit the model.
    """
    with _weights_in(file) as store:
        _load(model, skipped, skip_mismatch, weights_store=store, assets_store=None)


def read_assets(model: keras.Model, file: str, skipped: Sequence[Any]) -> None:
    """Reads vocabularies of text layers, and what else in a file is not numbers.

    Args:
        model: built.
        file: a `.keras` file.
        skipped: as for `read_weights`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it does not fit the model.
    """
    with zipfile.ZipFile(file) as archive:
        if not any(name.startswith(f"{_ASSETS}/") for name in archive.namelist()):
            return
        store = saving_lib.DiskIOStore(_ASSETS, archive=archive, mode="r")
        try:
            _load(model, skipped, False, weights_store=None, assets_store=store)
        finally:
            store.close()


@contextlib.contextmanager
def optimizer_in(file: str) -> Iterator[Any]:
    """The variables of the optimizer in a file, by number, as text; each is read when it is asked for."""
    with _weights_in(file) as store:
        yield store.get("optimizer")


def _load(model, skipped, skip_mismatch: bool, **stores) -> None:
    failed: set[int] = set()
    messages: dict = {}
    saving_lib._load_state(
        model,
        inner_path="",
        skip_mismatch=skip_mismatch,
        visited_saveables={id(one) for one in skipped},
        failed_saveables=failed,
        error_msgs=messages,
        **stores,
    )
    if failed:
        saving_lib._raise_loading_failure(messages, warn_only=skip_mismatch)


@contextlib.contextmanager
def _weights_in(file: str) -> Iterator[saving_lib.H5IOStore]:
    with contextlib.ExitStack() as opened:
        if file_utils.is_remote_path(file):
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            local = os.path.join(folder, os.path.basename(file))
            file_utils.copy(file, local)
            file = local
        if file.endswith(".weights.h5"):
            store = saving_lib.H5IOStore(file, mode="r")
        else:
            archive = opened.enter_context(zipfile.ZipFile(file))
            store = saving_lib.H5IOStore(_WEIGHTS, archive=_Members(archive), mode="r")
        opened.callback(store.close)
        yield store


class _Members:
    """The members of an archive, for Keras' reader of weights, which may be read in part.

    HDF5 jumps to and fro, and Python's own reader of a member starts anew for each step back. Keras stores
    without compression: the member is a part of the file.
    """

    def __init__(self, archive: zipfile.ZipFile):
        self._archive = archive

    def open(self, name: str, mode: str = "r") -> IO[bytes]:
        """The bytes of a member."""
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return self._archive.open(name)
        assert self._archive.filename is not None, "opened by its name"
        return io.BufferedReader(_Window(self._archive.filename, info))


class _Window(io.RawIOBase):
    """A member that is stored as it is."""

    def __init__(self, path: str, member: zipfile.ZipInfo):
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the window
        self._file.seek(member.header_offset + _LENGTHS_AT)
        lengths = struct.unpack("<HH", self._file.read(4))  # of what else is there
        self._start = member.header_offset + _HEADER_BYTES + sum(lengths)
        self._size, self._place = member.file_size, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self):
        return self._place

    def readinto(self, buffer):
        wanted = memoryview(buffer)[: max(0, self._size - self._place)]
        self._file.seek(self._start + self._place)
        count = self._file.readinto(wanted)
        self._place += count
        return count

    def close(self):
        self._file.close()
        super().close()
