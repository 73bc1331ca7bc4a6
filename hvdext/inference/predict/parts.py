"""One rank's part of a round, and the message in which it travels."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import Told
from hvdext.inference.predict.values import Value

_LENGTHS = struct.Struct("<QQ")  # of the head and of the body, in bytes


@dataclass
class Report:
    """What every rank hears of a part.

    Attributes:
        batches: computed in this round.
        rows: of the inputs.
        size: bytes of the predictions.
        seconds: of computing.
        has_ended: whether this rank has come to the end of its data.
        error: what it tells of its failure (`hvdext.comm.failures.told`); None if it has not failed.
        rows_kept: rows that rank 0 has written, so far as it knew when it sent this.
        structure: of the outputs; None without a batch.
    """

    batches: int = 0
    rows: int = 0
    size: int = 0
    seconds: float = 0.0
    has_ended: bool = False
    error: Told | None = None
    rows_kept: int = 0
    structure: Any = None


@dataclass
class Part:
    """A report and the predictions: for each output the values of this rank's batches, in order."""

    report: Report
    outputs: list[list[Value]] = field(default_factory=list)


def exchange(comm: Communicator, part: Part, name: str, *, everywhere: bool) -> list[Part]:
    """All ranks' parts, in rank order; every rank must call it.

    Args:
        comm: who exchanges.
        part: this rank's.
        name: the collective's.
        everywhere: whether all ranks receive the predictions. Otherwise rank 0 does, and the others hear
            the reports alone.
    """
    if comm.size == 1:
        return [part]
    whole = _packed(part)
    if everywhere:
        received = comm.allgather(tf.constant(whole), name)
    else:
        report = _packed(Part(part.report))
        message = np.concatenate([whole, *[report] * (comm.size - 1)])
        splits = [len(whole), *[len(report)] * (comm.size - 1)]
        received = comm.alltoall(tf.constant(message), splits, name)
    return list(_unpacked(received.numpy()))


def _packed(part: Part) -> np.ndarray:
    """uint8: two lengths, the pickled report with what is needed to read the rest, and the arrays' bytes."""
    body: list[np.ndarray] = []
    manifest = [
        [(value.kind, [_described(a, body) for a in value.arrays]) for value in values]
        for values in part.outputs
    ]
    head = cloudpickle.dumps((part.report, manifest))
    size = sum(array.nbytes for array in body)
    start = np.frombuffer(_LENGTHS.pack(len(head), size) + head, np.uint8)
    return np.concatenate([start, *body])


def _described(array, body):
    """How to read an array back; its bytes go to `body`. Text, which has none of its own, stays."""
    if array.dtype == object:
        return array
    body.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return array.dtype, array.shape


def _unpacked(message: np.ndarray) -> Iterator[Part]:
    """The parts in a message of several; their arrays are views of it."""
    start = 0
    while start < len(message):
        head_length, body_length = _LENGTHS.unpack(message[start : start + _LENGTHS.size].tobytes())
        start += _LENGTHS.size
        report, manifest = pickle.loads(message[start : start + head_length].tobytes())
        start += head_length
        yield Part(report, _read(message[start : start + body_length], manifest))
        start += body_length


def _read(body: np.ndarray, manifest: Sequence) -> list[list[Value]]:
    position = 0

    def array_of(description):
        nonlocal position
        if isinstance(description, np.ndarray):
            return description
        dtype, shape = description
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        array = body[position : position + length].view(dtype).reshape(shape)
        position += length
        return array

    return [[Value(kind, tuple(map(array_of, arrays))) for kind, arrays in values] for values in manifest]
