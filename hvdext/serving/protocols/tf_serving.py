"""TensorFlow Serving's REST: requests in rows or columns to arrays, arrays to answers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdext.serving.protocols.json_text import in_parts, read_json, require, write_json
from hvdext.serving.protocols.tensors import (
    check_names,
    check_rows,
    check_shape,
    from_nested,
    from_values,
    present,
    short,
    unnest,
)
from hvdext.serving.service import (
    DEFAULT_SIGNATURE,
    InvalidRequest,
    ModelVersion,
    Signature,
    State,
    TensorSpec,
)

_STATES = {
    State.LOADING: "LOADING",
    State.READY: "AVAILABLE",
    State.UNLOADING: "UNLOADING",
    State.UNAVAILABLE: "END",
}
_DTYPES = {
    "BOOL": "DT_BOOL",
    "UINT8": "DT_UINT8",
    "UINT16": "DT_UINT16",
    "UINT32": "DT_UINT32",
    "UINT64": "DT_UINT64",
    "INT8": "DT_INT8",
    "INT16": "DT_INT16",
    "INT32": "DT_INT32",
    "INT64": "DT_INT64",
    "FP16": "DT_HALF",
    "FP32": "DT_FLOAT",
    "FP64": "DT_DOUBLE",
    "BYTES": "DT_STRING",
}


@dataclass(frozen=True)
class PredictRequest:
    """One request to predict.

    Attributes:
        rows: True if it came in rows ("instances"), False for columns ("inputs"); the answer is alike.
        inputs: one array per input of the model, but for optional ones that are not there.
        signature: which of the model's is meant.
    """

    rows: bool
    inputs: dict[str, np.ndarray]
    signature: str


def read_request(body: bytes, version: ModelVersion) -> PredictRequest:
    """A request's body, checked against the model.

    Raises:
        InvalidRequest: if anything does not fit.
    """
    request = require(read_json(body), dict, "The request")
    name = request.get("signature_name") or DEFAULT_SIGNATURE
    if type(name) is not str or name not in version.signatures:
        names = " or ".join(map(repr, version.signatures))
        raise InvalidRequest(f"`signature_name` must be {names}. Received: {short(name)}.")
    signature, model = version.signatures[name], version.name
    if ("instances" in request) == ("inputs" in request):
        both = "both" if "inputs" in request else "neither"
        raise InvalidRequest(
            f'The request must have "instances" (rows) or "inputs" (columns). Received: {both}.'
        )
    rows = "instances" in request
    columns = _transposed(request["instances"], model, signature) if rows else request["inputs"]
    if not _is_columns(columns):
        if signature.bare is None:
            names = ", ".join(repr(spec.name) for spec in signature.inputs)
            raise InvalidRequest(
                f'"inputs" must be an object with {names}, the inputs of {model!r}. '
                f"Received: {short(columns)}."
            )
        columns = {signature.bare.name: columns}
    check_names(columns, signature, model)
    inputs = {spec.name: _read_input(columns[spec.name], spec) for spec in present(signature, columns)}
    check_rows(inputs)
    return PredictRequest(rows, inputs, name)


def _is_columns(value: Any) -> bool:
    """Tensors by name, and not one value in base 64?"""
    return type(value) is dict and set(value) != {"b64"}


def _transposed(instances: Any, model: str, signature: Signature) -> Any:
    """Rows as columns: one list if the rows are bare values, else a dict of lists."""
    instances = require(instances, list, '"instances"')
    if not instances:
        raise InvalidRequest('"instances" must hold one row or more. Received: none.')
    named = set(map(_is_columns, instances)) if dict in set(map(type, instances)) else {False}
    if named == {False}:
        if signature.bare is not None:
            return instances
        named = {True, False}
    if len(named) > 1:
        names = ", ".join(repr(spec.name) for spec in signature.inputs)
        raise InvalidRequest(f'Each of "instances" must be an object with {names}, the inputs of {model!r}.')
    sets = {frozenset(row) for row in instances}
    for names_ in sets:
        check_names(sorted(names_), signature, model)
    if len(sets) > 1:
        some = sorted(frozenset.union(*sets) - frozenset.intersection(*sets))
        raise InvalidRequest(
            f'All of "instances" must have the same inputs. Received: {", ".join(map(repr, some))} in some '
            "of them only."
        )
    (names_,) = sets
    return {spec.name: [row[spec.name] for row in instances] for spec in present(signature, names_)}


def _read_input(data: Any, spec: TensorSpec) -> np.ndarray:
    if spec.datatype != "BYTES":
        return from_nested(data, spec)
    label = f"input {spec.name!r}"
    values, lengths = unnest(data, label)
    check_shape(lengths, spec, label)
    return from_values([_decoded(value, label) for value in values], lengths, spec, label)


def _decoded(value: Any, label: str) -> Any:
    """The bytes of {"b64": "..."}; anything else as it is."""
    if type(value) is not dict:
        return value
    try:
        if set(value) != {"b64"}:
            raise ValueError(f"an object with {', '.join(map(repr, value)) or 'nothing'}")
        return base64.b64decode(value["b64"], validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise InvalidRequest(
            f'The data of {label} (BYTES) must be strings or {{"b64": "..."}} in base 64. '
            f"Received: {short(value)} ({error})."
        ) from error


def write_answer(rows: bool, signature: Signature, outputs: Mapping[str, np.ndarray]) -> bytes:
    """The body of an answer: rows as they came, or columns."""
    names = [spec.name for spec in signature.outputs]
    kind = "predictions" if rows else "outputs"
    if len(names) == 1:
        return write_json({kind: _plain(names[0], outputs[names[0]])})
    if not rows:
        return write_json({kind: {name: _plain(name, outputs[name]) for name in names}})
    together = zip(*(outputs[name] for name in names), strict=True)
    found = [dict(zip(names, map(_plain, names, row), strict=True)) for row in together]
    return write_json({kind: in_parts(found, sum(outputs[name].size for name in names) // len(found))})


def _plain(name: str, value: Any) -> Any:
    """A tensor, a row of one, or a single value of one."""
    as_base64 = name.endswith("_bytes")  # the convention of TensorFlow Serving
    if not isinstance(value, np.ndarray):
        return _nested_text(value, as_base64) if isinstance(value, bytes) else value
    if value.dtype != object:
        return in_parts(value)
    return in_parts(_nested_text(value.tolist(), as_base64), value.size // max(len(value), 1))


def _nested_text(value: Any, as_base64: bool) -> Any:
    if isinstance(value, list):
        return [_nested_text(inner, as_base64) for inner in value]
    if not as_base64:
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass  # JSON cannot hold it otherwise
    return {"b64": base64.b64encode(value).decode()}


def status(versions: Sequence[ModelVersion]) -> dict[str, Any]:
    """What `GET /v1/models/{model}` answers, the newest version first; `name` and `ready` are KServe's."""
    return {
        "name": versions[0].name,
        "ready": any(found.state is State.READY for found in versions),
        "model_version_status": [
            {
                "version": str(found.version),
                "state": _STATES[found.state],
                "status": {
                    "error_code": "OK" if found.state is not State.UNAVAILABLE else "UNAVAILABLE",
                    "error_message": found.reason,
                },
            }
            for found in sorted(versions, key=lambda found: -found.version)
        ],
    }


def metadata(version: ModelVersion) -> dict[str, Any]:
    """What `GET /v1/models/{model}/metadata` answers."""
    definitions = {
        name: {
            "inputs": {spec.name: _tensor_info(spec) for spec in signature.inputs},
            "outputs": {spec.name: _tensor_info(spec) for spec in signature.outputs},
            "method_name": "tensorflow/serving/predict",
        }
        for name, signature in version.signatures.items()
    }
    return {
        "model_spec": {"name": version.name, "signature_name": "", "version": str(version.version)},
        "metadata": {"signature_def": {"signature_def": definitions}},
    }


def _tensor_info(spec: TensorSpec) -> dict[str, Any]:
    sizes = ["-1" if length is None else str(length) for length in spec.shape]
    return {
        "dtype": _DTYPES[spec.datatype],
        "tensor_shape": {"dim": [{"size": size, "name": ""} for size in sizes], "unknown_rank": False},
        "name": spec.name,
    }
