"""Frames: how the front and its workers talk. A frame is a JSON header and raw tensors, never a pickle.

    4 bytes b"hvx1" | header length, 4 bytes | body length, 8 bytes | header: JSON | body: the tensors

Lengths are big-endian, tensors little-endian in C order, one after another in the order of the header's
`tensors`. Text (arrays of `object` that hold `bytes`): for each element its length in 4 bytes, then itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvdext.common.wording import describe

_MAGIC = b"hvx1"
_PREFIX = struct.Struct("!4sIQ")
_LENGTH = struct.Struct("<I")
_NUMBERS = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "bfloat16"),
)
MAX_HEADER = 8 << 20  # bytes
MAX_BODY = 8 << 30


class FrameError(Exception):
    """What was received is not a frame. The connection is of no further use."""


@dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        header: has at least a `kind`.
        tensors: by name.
    """

    header: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the message is about."""
        return self.header["kind"]


def encode(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> list[Any]:
    """The buffers to send, one after another; large tensors are not copied.

    Args:
        header: JSON; `tensors` is taken.
        tensors: by name.

    Raises:
        TypeError: if a tensor's dtype cannot travel.
        ValueError: if the header is too long.
    """
    specs, buffers = [], []
    for name, array in (tensors or {}).items():
        dtype, data = _to_bytes(name, array)
        specs.append({"name": name, "dtype": dtype, "shape": list(array.shape), "size": len(data)})
        buffers.append(data)
    text = json.dumps({**header, "tensors": specs}).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(f"a frame's header must have at most {MAX_HEADER} bytes. Received: {len(text)}.")
    prefix = _PREFIX.pack(_MAGIC, len(text), sum(map(len, buffers)))
    return [prefix + text, *(buffer for buffer in buffers if len(buffer))]


class FrameReader:
    """Puts frames together from what arrives, without input or output of its own.

    Receive into `buffer()`, then tell `received(n)` how many bytes came.

    Args:
        max_header: bytes; larger ones are refused before memory is taken for them.
        max_body: bytes.
    """

    def __init__(self, max_header: int = MAX_HEADER, max_body: int = MAX_BODY):
        self.max_header = max_header
        self.max_body = max_body
        self._filled = 0
        self._header_length: int | None = None
        self._view = memoryview(bytearray(_PREFIX.size))

    def buffer(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        return self._view[self._filled :]

    @property
    def between_frames(self) -> bool:
        """True if nothing of a frame has arrived yet."""
        return self._header_length is None and not self._filled

    def received(self, count: int) -> Frame | None:
        """Takes note of `count` bytes in the buffer; returns the frame that they complete.

        Raises:
            FrameError: if they are none.
        """
        self._filled += count
        if self._filled < len(self._view):
            return None
        if self._header_length is None:
            magic, header, body = _PREFIX.unpack(self._view)
            if magic != _MAGIC:
                raise FrameError(f"a frame must begin with {_MAGIC!r}. Received: {magic!r}.")
            if not 0 < header <= self.max_header or body > self.max_body:
                raise FrameError(
                    f"a frame may have a header of {self.max_header} and a body of {self.max_body} bytes. "
                    f"Received: {header} and {body}."
                )
            self._header_length, self._filled = header, 0
            self._view = memoryview(np.empty(header + body, np.uint8))  # type: ignore[arg-type]
            return None
        header, view = self._header_length, self._view
        self._expect_prefix()
        return _decode(view[:header], view[header:])

    def _expect_prefix(self):
        self._filled = 0
        self._header_length = None
        self._view = memoryview(bytearray(_PREFIX.size))


def _decode(text: memoryview, body: memoryview) -> Frame:
    try:
        header = json.loads(bytes(text))
        tensors, start = {}, 0
        for spec in header.pop("tensors"):
            name, dtype, size = spec["name"], spec["dtype"], spec["size"]
            shape = tuple(spec["shape"])
            if not all(type(n) is int and n >= 0 for n in (*shape, size)):
                raise FrameError(f"sizes must be whole numbers. Received: {spec}.")
            if start + size > len(body):
                raise FrameError(f"tensor {name!r} must lie within the body of {len(body)} bytes.")
            tensors[name] = _from_bytes(body[start : start + size], dtype, shape)
            start += size
        if start != len(body):
            raise FrameError(f"the tensors must fill the body of {len(body)} bytes. Received: {start}.")
        if not isinstance(header["kind"], str):
            raise FrameError(f"`kind` must be text. Received: {header['kind']!r}.")
        return Frame(header, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise FrameError(f"the frame's header is wrong: {describe(error)}") from error


def _to_bytes(name: str, array: np.ndarray) -> tuple[str, Any]:
    if array.dtype == object:
        texts = [text.encode() if isinstance(text, str) else bytes(text) for text in array.ravel()]
        return "bytes", b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
    if array.dtype.name not in _NUMBERS:
        raise TypeError(f"tensor {name!r} must hold numbers or text. Received: {array.dtype}.")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.dtype.name, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _from_bytes(data: memoryview, name: str, shape: tuple[int, ...]) -> np.ndarray:
    count = 1
    for length in shape:
        count *= length
    if name == "bytes":
        return _texts(data, count).reshape(shape)
    dtype = _dtype(name)
    if count * dtype.itemsize != len(data):
        raise FrameError(
            f"{name} of shape {shape} must have {count * dtype.itemsize} bytes, not {len(data)}."
        )
    if not count:
        return np.empty(shape, dtype)
    array = np.frombuffer(data, np.uint8)
    if array.ctypes.data % dtype.itemsize:  # after a header of odd length
        array = array.copy()
    return array.view(dtype).reshape(shape)


def _dtype(name: str) -> np.dtype:
    if name not in _NUMBERS:
        raise FrameError(f"a tensor's dtype must be one of {_NUMBERS} or bytes. Received: {name!r}.")
    if name == "bfloat16":  # not NumPy's own; TensorFlow brings it along
        from ml_dtypes import bfloat16

        return np.dtype(bfloat16)
    return np.dtype(name)


def _texts(data: memoryview, count: int) -> np.ndarray:
    if count * _LENGTH.size > len(data):
        raise FrameError(f"{count} texts do not fit into {len(data)} bytes.")
    texts, start = np.empty(count, object), 0
    for i in range(count):
        if start + _LENGTH.size > len(data):
            raise FrameError(f"text {i} of {count} must lie within the tensor's {len(data)} bytes.")
        (length,) = _LENGTH.unpack_from(data, start)
        start += _LENGTH.size
        if start + length > len(data):
            raise FrameError(f"text {i} of {count} must lie within the tensor's {len(data)} bytes.")
        texts[i] = bytes(data[start : start + length])
        start += length
    if start != len(data):
        raise FrameError(f"{count} texts must fill the tensor's {len(data)} bytes. Received: {start}.")
    return texts
