"""A stage of a model, read from a `.keras` file: the process holds no other layers' weights.

The file's model is built without values and cut by `hvd.plan`. Only the layers of the stage get variables,
and only their values are read.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import keras
import tensorflow as tf
from keras.src.saving import saving_lib

from hvdext.keras_tools.functional import Calls, calls_of, unallocated
from hvdext.placement.pipeline.stages import Chunk, Stage, cut
from hvdext.placement.plan.planner import plan
from hvdext.serving.worker.signatures import Port, keras_ports, port

_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_ASSETS = "assets"
# Of the header in front of a member in an archive.
_LENGTHS_AT, _HEADER_BYTES = 26, 30


@dataclass(frozen=True)
class StageOfModel:
    """One stage; called with a list of tensors, it returns one.

    Attributes:
        model: the whole model, of whose variables only those of the stage have values.
        layers: the stage.
        takes: what enters it: at the first stage the model's inputs.
        gives: what leaves it: at the last the model's outputs.
        model_ports: what the whole model takes and gives.
        places: of each output of the last stage, its place among what the stage makes.
    """

    model: keras.Model
    layers: Stage
    takes: tuple[Port, ...]
    gives: tuple[Port, ...]
    model_ports: tuple[list[Port], list[Port]]
    places: tuple[int, ...]

    def __call__(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What leaves the stage."""
        made = self.layers(list(tensors), training=False)
        return [made[place] for place in self.places]


def load_stage(path: str | os.PathLike, number: int, stages: int) -> StageOfModel:
    """Stage `number`, 0 to `stages` - 1, of the model in a `.keras` file.

    Raises:
        ValueError: if the model cannot be read or cut into so many stages, or the file does not fit it.
    """
    if not 0 <= number < stages:
        raise ValueError(f"`stage` must lie in 0 to {stages - 1}. Received: stage={number!r}.")
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read(_CONFIG))
        config["compile_config"] = None
        model, _ = unallocated(lambda: keras.saving.deserialize_keras_object(config, safe_mode=True))
        ports = keras_ports(model)
        calls = calls_of(model)
        chunk = cut(calls, plan(model, places=stages))[number]
        stage = Stage(chunk)
        _read_weights(archive, calls, stage)
        _read_assets(archive, calls, stage)
    return _with_names(stage, calls, ports, is_first=number == 0, is_last=number == stages - 1)


def _read_weights(archive: zipfile.ZipFile, calls: Calls, stage: Stage) -> None:
    """Gives the stage's variables their values in the file, and those without one there their first."""
    store = saving_lib.H5IOStore(_WEIGHTS, archive=_Members(archive), mode="r")
    try:
        # Values are noted, not copied into others that stand there already.
        with keras.StatelessScope(initialize_variables=False) as scope:
            _load_own(calls, stage, weights_store=store, assets_store=None)
    finally:
        store.close()
    for variable in stage.variables:
        value = scope.get_current_value(variable)
        if value is not None:
            variable._initialize(value)
        elif variable._value is None:  # the state of a random generator
            variable._deferred_initialize()


def _read_assets(archive: zipfile.ZipFile, calls: Calls, stage: Stage) -> None:
    """Vocabularies of text layers, and what else is not numbers."""
    if not any(name.startswith(f"{_ASSETS}/") for name in archive.namelist()):
        return
    store = saving_lib.DiskIOStore(_ASSETS, archive=archive, mode="r")
    try:
        _load_own(calls, stage, weights_store=None, assets_store=store)
    finally:
        store.close()


def _load_own(calls: Calls, stage: Stage, **stores) -> None:
    """What `keras.models.load_model` does, for the stage's layers only."""
    own = {id(call.operation) for call in stage.chunk.calls}
    foreign = {id(call.operation) for call in calls.calls} - own
    failed: set[int] = set()
    messages: dict = {}
    saving_lib._load_state(
        calls.model,
        inner_path="",
        visited_saveables=foreign,
        failed_saveables=failed,
        error_msgs=messages,
        **stores,
    )
    if failed:
        saving_lib._raise_loading_failure(messages)


def _with_names(stage: Stage, calls: Calls, ports, is_first: bool, is_last: bool) -> StageOfModel:
    takes = tuple(ports[0]) if is_first else _crossing(stage.chunk, "takes")
    if not is_last:
        gives = _crossing(stage.chunk, "gives")
        return StageOfModel(calls.model, stage, takes, gives, ports, tuple(range(len(gives))))
    # An output that the model gives twice leaves the stage once; masks stay inside.
    made = [None if parcel.is_mask else parcel.name for parcel in stage.chunk.gives]
    places = tuple(made.index(name) for name in calls.outputs)
    return StageOfModel(calls.model, stage, takes, tuple(ports[1]), ports, places)


def _crossing(chunk: Chunk, side: str) -> tuple[Port, ...]:
    """Tensors between two stages, called as the layers that make them."""
    return tuple(
        port(f"{parcel.name}/mask" if parcel.is_mask else parcel.name, parcel.spec.dtype, parcel.spec.shape)
        for parcel in getattr(chunk, side)
    )


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
