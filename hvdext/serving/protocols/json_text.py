"""JSON, read strictly and written fast."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import orjson

from hvdext.serving.protocols.tensors import short
from hvdext.serving.service import InvalidRequest

T = TypeVar("T")
_STEP = 1 << 16  # numbers: some 10 ms
_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a whole number"}


def read_json(text: bytes) -> Any:
    """What the text says.

    Raises:
        InvalidRequest: if it is no JSON (which has no NaN and no Infinity), no UTF-8, or nested too deep.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body must be JSON in UTF-8. {error}.") from error


def write_json(value: Any) -> bytes:
    """The text; NumPy arrays as lists, numbers that are not finite as null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def in_parts(values: np.ndarray | list, each: int | None = None) -> Any:
    """The same for `write_json`. What is long is written here, in parts, between which other threads go on.

    Args:
        values: a list, or an array with an axis or more.
        each: how many numbers or texts each of them holds; None: as the array says.
    """
    if isinstance(values, np.ndarray):
        if not (values.flags.c_contiguous and values.dtype.isnative):  # orjson writes no others
            values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        each = values.size // max(len(values), 1)
    each = each or 1
    if len(values) * each <= _STEP:
        return values
    if each > _STEP:
        parts = [write_json(in_parts(row) if isinstance(row, np.ndarray) else row) for row in values]
    else:
        step = _STEP // each
        parts = [write_json(values[i : i + step])[1:-1] for i in range(0, len(values), step)]
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")


def require(value: Any, kind: type[T], label: str) -> T:
    """The value, if JSON had it as that kind.

    Args:
        value: as read; None also stands for what is missing.
        kind: dict, list, str, bool or int.
        label: what it is, to begin the message with.

    Raises:
        InvalidRequest: if it is something else.
    """
    if type(value) is not kind:
        received = "nothing" if value is None else short(value)
        raise InvalidRequest(f"{label} must be {_NAMES[kind]}. Received: {received}.")
    return value
