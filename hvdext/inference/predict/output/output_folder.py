"""Predictions in files: one `.npy` per output, and `progress.json`, which says how far they are right."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.inference.predict.output.npy_file import NpyFile
from hvdext.inference.predict.values import Value

PROGRESS = "progress.json"
_FORMAT = 1


@dataclass(frozen=True)
class Done:
    """How far predictions have come: the first `batches`, which have `rows`."""

    batches: int = 0
    rows: int = 0
    is_finished: bool = False


class OutputFolder:
    """What rank 0 writes; nobody else touches it.

    Args:
        folder: made if it does not exist.
        settings: what a later run must share to go on with this one.
        resume: whether to go on with what the folder holds.

    Attributes:
        done: what was there.

    Raises:
        ValueError: if the folder holds predictions and `resume` is False, or other ones than these.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *, resume: bool):
        self.folder = folder
        self._settings = {key: str(value) for key, value in settings.items()}
        self._files: list[NpyFile] = []
        self._outputs: list[dict[str, Any]] = []
        self.done = Done()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output` must be a folder. Received: {str(folder)!r}, a file.")
        if (folder / PROGRESS).exists():
            self._take_up(resume)
        else:
            present = sorted(path.name for path in folder.glob("*.npy"))
            if present:
                raise ValueError(
                    "`output` must be a folder without .npy files of others. "
                    f"Received: {str(folder)!r}, which holds {present[0]!r}."
                )
            folder.mkdir(parents=True, exist_ok=True)
            self._save()

    def append(self, structure: Any, outputs: Sequence[Sequence[Value]], batches: int, rows: int) -> None:
        """Writes what one rank has computed.

        Args:
            structure: of the outputs.
            outputs: the values of each, in order.
            batches: how many they are.
            rows: of the inputs, and so of every output.

        Raises:
            ValueError: if an output cannot be one array on disk.
        """
        arrays = [[_storable(value) for value in values] for values in outputs]
        if not self._files:
            self._create(structure, [found[0] for found in arrays])
        for file, output, found in zip(self._files, self._outputs, arrays, strict=True):
            _check(output, found, rows)
            for array in found:
                file.append(array)
        self.done = Done(self.done.batches + batches, self.done.rows + rows)

    def flush(self) -> None:
        """Makes what was appended count, for readers and for later runs."""
        for file in self._files:
            file.flush()
        self._save()

    def finish(self, structure: Any, nothing: Sequence[Value]) -> Any:
        """Closes the files and returns them, mapped into memory, in the structure of the outputs.

        Args:
            structure: of the outputs.
            nothing: a value without rows for each output, for files that do not exist yet.
        """
        if not self.done.is_finished:
            if not self._files:
                self._create(structure, [_storable(value) for value in nothing])
            self.close()
            self.done = Done(self.done.batches, self.done.rows, is_finished=True)
            self._save()
        maps = [np.load(self.folder / output["file"], mmap_mode="r") for output in self._outputs]
        return keras.tree.pack_sequence_as(structure, maps)

    def close(self) -> None:
        """Closes the files as they are."""
        for file in self._files:
            file.close()
        self._files = []

    def _create(self, structure, samples):
        for name, sample in zip(file_names(structure), samples, strict=True):
            self._outputs.append({"file": name, "dtype": sample.dtype.str, "shape": list(sample.shape[1:])})
            self._files.append(NpyFile(self.folder / name, sample.dtype, sample.shape[1:]))

    def _take_up(self, resume):
        if not resume:
            raise ValueError(
                "`output` must be a folder without predictions, or resume=True go on with them. "
                f"Received: {str(self.folder)!r}, which holds {PROGRESS}."
            )
        try:
            found = json.loads((self.folder / PROGRESS).read_text())
            done = Done(found["batches"], found["rows"], found["finished"])
            settings, outputs = found["settings"], found["outputs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`output` must hold a {PROGRESS} that can be read. Received: {error!r}."
            ) from error
        keys = dict.fromkeys([*settings, *self._settings])
        different = [key for key in keys if settings.get(key) != self._settings.get(key)]
        if different:
            lines = [f"  {key}: then {settings.get(key)}, now {self._settings.get(key)}" for key in different]
            raise ValueError(
                "`resume` must go on with the settings, data and weights with which "
                f"{str(self.folder)!r} was begun. Different:\n" + "\n".join(lines)
            )
        if done.rows or done.is_finished:  # else it has come to nothing
            self.done, self._outputs = done, outputs
        if not done.is_finished:
            self._files = [
                NpyFile(self.folder / one["file"], np.dtype(one["dtype"]), tuple(one["shape"]), done.rows)
                for one in self._outputs
            ]

    def _save(self):
        content = {
            "format": _FORMAT,
            "settings": self._settings,
            "outputs": self._outputs,
            "batches": self.done.batches,
            "rows": self.done.rows,
            "finished": self.done.is_finished,
        }
        fresh = self.folder / f".{PROGRESS}.{os.getpid()}"
        fresh.write_text(json.dumps(content, indent=1))
        fresh.replace(
            self.folder / PROGRESS
        )  # at once: whoever is killed here leaves the old one or the new one


def file_names(structure: Any) -> list[str]:
    """One for each output: `predictions.npy`, or named after its place: `mask.npy`, `boxes.0.npy`."""
    names: list[str] = []
    for path, _ in keras.tree.flatten_with_path(structure):
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join(map(str, path))).strip(".") or "predictions"
        while f"{name}.npy" in names:
            name += "_"
        names.append(f"{name}.npy")
    return names


def _storable(value):
    (array, *rest) = value.arrays
    if rest or array.ndim == 0 or array.dtype == object:
        kind = "text" if array.dtype == object else "a scalar" if array.ndim == 0 else value.kind
        raise ValueError(f"`output` needs predictions that are dense arrays of numbers. Received: {kind}.")
    # NumPy's files do not know bfloat16; as float32 it is the same number.
    return array.astype(np.float32) if array.dtype == tf.bfloat16.as_numpy_dtype else array


def _check(output, arrays, rows):
    expected = (np.dtype(output["dtype"]), tuple(output["shape"]))
    for array in arrays:
        if (array.dtype, array.shape[1:]) != expected:
            raise ValueError(
                "`output` needs predictions that have one shape per row in all batches. Received: "
                f"{expected[0].name} {expected[1]} first, then {array.dtype.name} {array.shape[1:]}."
            )
    count = sum(map(len, arrays))
    if count != rows:
        raise ValueError(
            f"`output` needs one row of predictions per row of inputs. Received: {count} for {rows}."
        )
