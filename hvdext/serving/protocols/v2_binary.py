"""The binary tensor extension of the Open Inference Protocol: tensors as bytes behind the JSON."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from hvdext.serving.protocols.tensors import DTYPES, check_shape, shape_text, short
from hvdext.serving.service import InvalidRequest, TensorSpec

HEADER_LENGTH = "inference-header-content-length"
_LENGTH = struct.Struct("<I")  # before each element of BYTES


def split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """The JSON and the tensors behind it.

    Args:
        body: the request's.
        header_length: what the header `Inference-Header-Content-Length` says: bytes of JSON. None, if it is
            not there: all of it is JSON.

    Raises:
        InvalidRequest: if the header is no number, or larger than the body.
    """
    if header_length is None:
        return body, memoryview(b"")
    length = int(header_length) if header_length.isdecimal() and len(header_length) < 19 else -1
    if not 0 <= length <= len(body):
        raise InvalidRequest(
            "The header Inference-Header-Content-Length must be the bytes of JSON that the body begins with, "
            f"0 to {len(body)} for this body of {len(body)} bytes. Received: {short(header_length)}."
        )
    return body[:length], memoryview(body)[length:]


def decode(data: memoryview, shape: Sequence[int], spec: TensorSpec) -> np.ndarray:
    """A tensor from its bytes, row major and little-endian; the array shares their memory.

    Raises:
        InvalidRequest: if the shape does not fit the input, or the bytes the shape.
    """
    label = f"input {spec.name!r}"
    check_shape(shape, spec, label)
    count = math.prod(shape)
    if spec.datatype == "BYTES":
        return _decode_bytes(data, count, label).reshape(shape)
    dtype = DTYPES[spec.datatype]
    if len(data) != count * dtype.itemsize:
        raise InvalidRequest(
            f"The binary data of {label} must be {count * dtype.itemsize} bytes long: {spec.datatype} of "
            f"shape {shape_text(shape)}. Received: {len(data)} bytes."
        )
    if spec.datatype == "BOOL" and (np.frombuffer(data, np.uint8) > 1).any():
        raise InvalidRequest(f"The binary data of {label} (BOOL) must be bytes of 0 or 1.")
    return np.frombuffer(data, dtype).reshape(shape)


def _decode_bytes(data: memoryview, count: int, label: str) -> np.ndarray:
    # Each element takes 4 bytes at least: a shape that lies is refused before memory is taken for it.
    values: list[bytes] = []
    start = 0
    while start < len(data) and len(values) < count:
        if start + _LENGTH.size > len(data):
            break
        (length,) = _LENGTH.unpack_from(data, start)
        end = start + _LENGTH.size + length
        if end > len(data):
            raise InvalidRequest(
                f"The binary data of {label} ends early: element {len(values)} must have {length} bytes. "
                f"Received: {len(data) - start - _LENGTH.size}."
            )
        values.append(bytes(data[start + _LENGTH.size : end]))
        start = end
    if len(values) != count or start != len(data):
        raise InvalidRequest(
            f"The binary data of {label} (BYTES) must be {count} elements, each a length of 4 bytes "
            f"(little-endian) and the bytes. Received: {len(values)}, then {len(data) - start} bytes."
        )
    array = np.empty(count, object)
    array[:] = values
    return array


def raw_shape(data: memoryview, spec: TensorSpec) -> list[int]:
    """The shape of an input that is the whole body (a header length of 0): as many rows as its bytes fill.

    Raises:
        InvalidRequest: if its size does not say it.
    """
    row = spec.shape[1:]
    if spec.datatype == "BYTES" or None in row:
        raise InvalidRequest(
            f"A body without JSON is taken for an input whose size says its shape, not for {spec.name!r}: "
            f"{spec.datatype} of shape {shape_text(spec.shape)}."
        )
    row_bytes = DTYPES[spec.datatype].itemsize * math.prod(length or 1 for length in row)
    if not data or len(data) % row_bytes:
        raise InvalidRequest(
            f"A body without JSON must be rows of input {spec.name!r}, {row_bytes} bytes each "
            f"({spec.datatype} of shape {shape_text(spec.shape)}). Received: {len(data)} bytes."
        )
    return [len(data) // row_bytes, *(length or 1 for length in row)]


def encode(array: np.ndarray) -> bytes | memoryview:
    """A tensor's bytes, row major and little-endian."""
    if array.dtype == object:
        return b"".join(part for value in array.flat for part in (_LENGTH.pack(len(value)), value))
    little = array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data
