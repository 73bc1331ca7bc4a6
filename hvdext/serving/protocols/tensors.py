"""Tensors as JSON writes them, checked against what a model takes, as NumPy arrays and back."""

from __future__ import annotations

import itertools
import math
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hvdext.common.checks import did_you_mean
from hvdext.serving.service import InvalidRequest, Signature, TensorSpec

_STEP = 1 << 14  # values
# The protocol's datatypes; little-endian, as they travel in binary.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}

# What JSON may hold for a tensor of each kind of dtype, and what to call it.
_ALLOWED: dict[str, tuple[set[type], str]] = {
    "b": ({bool}, "true or false"),
    "u": ({int}, "whole numbers, without a decimal point"),
    "i": ({int}, "whole numbers, without a decimal point"),
    "f": ({int, float}, "numbers (JSON has no NaN and no Infinity)"),
    "O": ({str, bytes}, "strings"),
}
_JSON_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number with a fraction",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def short(value: Any) -> str:
    """What was received, for a message: never more than a line of it."""
    return reprlib.repr(value)


def shape_text(shape: Sequence[int | None]) -> str:
    """A shape as messages show it: [any, 28, 28]."""
    return "[" + ", ".join("any" if length is None else str(length) for length in shape) + "]"


def unnest(data: Any, label: str) -> tuple[list, list[int]]:
    """The values of nested lists, in order, and the lengths of the levels.

    Args:
        data: as JSON was read.
        label: what it is, for messages: "input 'x'".

    Raises:
        InvalidRequest: if it is no list, or ragged.
    """
    if type(data) is not list:
        raise InvalidRequest(f"The data of {label} must be a list. Received: {_JSON_NAMES[type(data)]}.")
    level, lengths = data, [len(data)]
    while list in (kinds := _kinds(level)):
        if len(kinds) > 1:
            other = next(kind for kind in kinds if kind is not list)
            raise InvalidRequest(
                f"The data of {label} is ragged: at depth {len(lengths)} it holds lists and "
                f"{_JSON_NAMES[other]}."
            )
        found = sorted(set().union(*(map(len, part) for part in _parts(level))))
        if len(found) > 1:
            raise InvalidRequest(
                f"The data of {label} is ragged: lists at depth {len(lengths)} must be of one length. "
                f"Received: lengths {found[0]} and {found[-1]}."
            )
        lengths.append(found[0])
        flat: list = []
        for part in _parts(level):
            flat += itertools.chain.from_iterable(part)
        level = flat
    return level, lengths


def _parts(values: list) -> Iterator[list]:
    # Within one step of C, however long, no other thread goes on: what reads a large body takes many.
    for start in range(0, len(values), _STEP):
        yield values[start : start + _STEP]


def _kinds(values: list) -> set[type]:
    return set().union(*(map(type, part) for part in _parts(values)))


def from_values(values: list, shape: Sequence[int], spec: TensorSpec, label: str) -> np.ndarray:
    """An array of the input's dtype.

    Args:
        values: flat, row major, as JSON was read, one or more; `bytes` are taken for BYTES as well.
        shape: lengths whose product is the number of values.
        spec: the input's.
        label: what it is, for messages.

    Raises:
        InvalidRequest: if a value is not of the datatype, or out of its range.
    """
    dtype = DTYPES[spec.datatype]
    allowed, rule = _ALLOWED[dtype.kind]
    wrong = _kinds(values) - allowed
    if wrong:
        first = next(value for value in values if type(value) in wrong)
        raise InvalidRequest(
            f"The data of {label} ({spec.datatype}) must be {rule}. "
            f"Received: {_JSON_NAMES[type(first)]}, {short(first)}."
        )
    if dtype.kind == "O":
        array = np.empty(len(values), object)
        array[:] = [value.encode() if type(value) is str else value for value in values]
    else:
        array = _narrowed(values, dtype, spec, label)
    return array.reshape(shape)


def _narrowed(values: list, dtype: np.dtype, spec: TensorSpec, label: str) -> np.ndarray:
    if dtype.kind == "b":
        return _array(values, dtype, dtype)
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            narrow = _array(values, np.dtype(np.float64), dtype)  # rounds; infinite beyond the range
        finite = np.isfinite(narrow)
        if finite.all():
            return narrow
        low, high = float(np.finfo(dtype).min), float(np.finfo(dtype).max)
        wrong = values[int(finite.argmin())]
    else:
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        if all(low <= min(part) and max(part) <= high for part in _parts(values)):
            return _array(values, dtype, dtype)
        wrong = next(value for value in values if not low <= value <= high)
    raise InvalidRequest(
        f"The data of {label} must lie in the range of {spec.datatype}, {low} to {high}. "
        f"Received: {short(wrong)}."
    )


def _array(values: list, read_as: np.dtype, dtype: np.dtype) -> np.ndarray:
    array = np.empty(len(values), dtype)
    start = 0
    for part in _parts(values):
        array[start : start + len(part)] = np.array(part, read_as)
        start += len(part)
    return array


def check_shape(shape: Sequence[int], spec: TensorSpec, label: str) -> None:
    """Does a shape fit the input?

    Raises:
        InvalidRequest: if the rank or a fixed length differs, or a length is 0.
    """
    fits = len(shape) == len(spec.shape) and all(
        length >= 1 and (fixed is None or length == fixed)
        for length, fixed in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        raise InvalidRequest(
            f"The shape of {label} must be {shape_text(spec.shape)}, with lengths of 1 or more. "
            f"Received: {shape_text(shape)}."
        )


def check_names(received: Collection[str], signature: Signature, model: str) -> None:
    """Are all inputs there that must be, and no others?

    Raises:
        InvalidRequest: says which are missing or unknown, and the nearest name.
    """
    expected = [spec.name for spec in signature.inputs]
    takes = f"Model {model!r} takes the inputs {', '.join(map(repr, expected))}."
    for name in received:
        if name not in expected:
            hint = did_you_mean(name, expected)
            raise InvalidRequest(f"{takes} Received another one: {short(name)}.{hint}")
    missing = [spec.name for spec in signature.inputs if spec.name not in received and not spec.optional]
    if missing:
        raise InvalidRequest(f"{takes} Missing: {', '.join(map(repr, missing))}.")
    if not received:
        raise InvalidRequest(f"{takes} A request must have one of them at least. Received: none.")


def present(signature: Signature, names: Collection[str]) -> list[TensorSpec]:
    """Those of the inputs that a request has, in the model's order."""
    return [spec for spec in signature.inputs if spec.name in names]


def check_rows(inputs: Mapping[str, np.ndarray]) -> None:
    """Have all inputs the same number of rows?

    Raises:
        InvalidRequest: if not.
    """
    rows = {name: len(array) for name, array in inputs.items()}
    if len(set(rows.values())) > 1:
        raise InvalidRequest(
            "All inputs must have the same number of rows (the first axis). Received: "
            + ", ".join(f"{name!r} with {count}" for name, count in rows.items())
            + "."
        )


def from_nested(data: Any, spec: TensorSpec) -> np.ndarray:
    """An input from lists nested as deep as its shape; the lengths of the lists are the shape.

    Raises:
        InvalidRequest: if the data does not fit the input.
    """
    label = f"input {spec.name!r}"
    values, lengths = unnest(data, label)
    check_shape(lengths, spec, label)
    return from_values(values, lengths, spec, label)


def from_shaped(data: Any, shape: Sequence[int], spec: TensorSpec) -> np.ndarray:
    """An input from a shape and data that is nested like it or flat.

    Raises:
        InvalidRequest: if the data does not fit the shape, or one of them the input.
    """
    label = f"input {spec.name!r}"
    check_shape(shape, spec, label)
    values, lengths = unnest(data, label)
    if len(lengths) > 1 and lengths != list(shape):
        raise InvalidRequest(
            f"The data of {label} must be flat or nested like its shape, {shape_text(shape)}. "
            f"Received: lists nested as {shape_text(lengths)}."
        )
    if len(values) != math.prod(shape):
        raise InvalidRequest(
            f"The data of {label} must hold {math.prod(shape)} values for the shape {shape_text(shape)}. "
            f"Received: {len(values)}."
        )
    return from_values(values, shape, spec, label)
