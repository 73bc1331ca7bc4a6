"""JSON Schemas of requests, made from what the models take, and of answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hvdext.inference.serving.service import Signature, State, TensorSpec
from hvdext.inference.serving.tensors import DTYPES
from hvdext.inference.serving.tf_serving import SIGNATURE_NAME

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": ["number", "null"], "minimum": 0}
_DATATYPE: Schema = {"type": "string", "enum": list(DTYPES)}


def object_of(required: dict[str, Schema], optional: dict[str, Schema] | None = None, **more: Any) -> Schema:
    """An object with these properties."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        **more,
    }


def list_of(items: Schema, length: int | None = None, least: int = 0) -> Schema:
    """A list, of a fixed length or of any."""
    if length is not None:
        return {"type": "array", "items": items, "minItems": length, "maxItems": length}
    return {"type": "array", "items": items, "minItems": least}


def any_of(schemas: Iterable[Schema]) -> Schema:
    """One of them; the schema itself if there is one."""
    found = list(schemas)
    return found[0] if len(found) == 1 else {"anyOf": found}


ERROR = object_of({"error": {"type": "string", "description": "What was expected, and what was received."}})
_PARAMETERS: Schema = {"type": ["object", "null"], "additionalProperties": True}


def _value(spec: TensorSpec, base64: bool) -> Schema:
    dtype = DTYPES[spec.datatype]
    if dtype.kind == "b":
        return {"type": "boolean"}
    if dtype.kind == "O":
        encoded = object_of({"b64": {"type": "string", "pattern": "^([A-Za-z0-9+/]{4})*$"}}, maxProperties=1)
        return {"anyOf": [TEXT, encoded]} if base64 else TEXT
    if dtype.kind == "f":
        limits = np.finfo(dtype)
        high = float(limits.max)
        if dtype.itemsize == 8:
            return {"type": "number", "minimum": -high, "maximum": high}
        beyond = high + 2.0 ** (limits.maxexp - limits.nmant - 2)  # from here on it rounds to infinity
        return {"type": "number", "exclusiveMinimum": -beyond, "exclusiveMaximum": beyond}
    whole = np.iinfo(dtype)
    return {"type": "integer", "minimum": int(whole.min), "maximum": int(whole.max)}


def _row(spec: TensorSpec, base64: bool) -> Schema:
    schema = _value(spec, base64)
    for length in reversed(spec.shape[1:]):
        schema = list_of(schema, length, least=1)
    return schema


def _rows(spec: TensorSpec, base64: bool) -> Schema:
    return list_of(_row(spec, base64), spec.shape[0], least=1)


def infer_request(signature: Signature) -> Schema:
    """A request of the Open Inference Protocol to a model, all of it JSON."""
    names = [spec.name for spec in signature.outputs]
    parameters = {
        "type": ["object", "null"],
        "properties": {
            "timeout": {
                "type": ["integer", "null"],
                "minimum": 0,
                "description": "Microseconds the request may take; 0: the server's own limit.",
            },
            "binary_data_output": {"type": ["boolean", "null"], "description": "All outputs in binary."},
        },
    }
    output_parameters = {
        "type": ["object", "null"],
        "properties": {"binary_data": {"type": ["boolean", "null"]}},
    }
    output = object_of({"name": {"type": "string", "enum": names}}, {"parameters": output_parameters})
    inputs = list_of(any_of(map(_input, signature.inputs)), len(signature.inputs))
    return object_of(
        {"inputs": inputs},
        {
            "id": {"type": ["string", "null"], "description": "Comes back with the answer."},
            "parameters": parameters,
            "outputs": {
                "anyOf": [list_of(output), {"type": "null"}],
                "description": "Those asked for; all without.",
            },
        },
    )


def _input(spec: TensorSpec) -> Schema:
    shape = {
        "type": "array",
        "prefixItems": [
            {"type": "integer", "minimum": 1} if length is None else {"const": length}
            for length in spec.shape
        ],
        "minItems": len(spec.shape),
        "maxItems": len(spec.shape),
    }
    data = any_of(
        [_rows(spec, False)] + ([list_of(_value(spec, False), least=1)] if len(spec.shape) > 1 else [])
    )
    return object_of(
        {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": shape,
            "data": {**data, "description": "Nested like `shape`, or flat."},
        },
        {"parameters": _PARAMETERS},
    )


def predict_request(signature: Signature) -> Schema:
    """A request of TensorFlow Serving to a model: rows or columns."""
    specs = signature.inputs
    row = object_of({spec.name: _row(spec, True) for spec in specs}, additionalProperties=False)
    columns = object_of({spec.name: _rows(spec, True) for spec in specs}, additionalProperties=False)
    bare = len(specs) == 1
    rows_of = any_of([list_of(_row(specs[0], True), least=1)] * bare + [list_of(row, least=1)])
    columns_of = any_of([_rows(specs[0], True)] * bare + [columns])
    name = {"signature_name": {"enum": [SIGNATURE_NAME, "", None]}}
    return {
        "oneOf": [
            object_of({"instances": rows_of}, name, **{"not": {"required": ["inputs"]}}),
            object_of({"inputs": columns_of}, name, **{"not": {"required": ["instances"]}}),
        ]
    }


GENERIC_INFER_REQUEST = object_of(
    {
        "inputs": list_of(
            object_of(
                {
                    "name": TEXT,
                    "datatype": _DATATYPE,
                    "shape": list_of({"type": "integer", "minimum": 1}, least=1),
                },
                {"data": {"type": "array"}, "parameters": _PARAMETERS},
            ),
            least=1,
        )
    },
    {
        "id": {"type": ["string", "null"]},
        "parameters": _PARAMETERS,
        "outputs": list_of(object_of({"name": TEXT}, {"parameters": _PARAMETERS})),
    },
)
GENERIC_PREDICT_REQUEST: Schema = {
    "oneOf": [
        object_of({"instances": list_of({}, least=1)}, {"signature_name": TEXT}),
        object_of({"inputs": {"type": ["array", "object"]}}, {"signature_name": TEXT}),
    ]
}

_TENSOR = object_of(
    {"name": TEXT, "datatype": _DATATYPE, "shape": list_of({"type": "integer", "minimum": -1})}
)
_TF_TENSORS: Schema = {
    "type": "object",
    "additionalProperties": object_of({"dtype": TEXT, "tensor_shape": {"type": "object"}, "name": TEXT}),
}
_TF_SIGNATURE = object_of({"inputs": _TF_TENSORS, "outputs": _TF_TENSORS, "method_name": TEXT})
_STATE: Schema = {"type": "string", "enum": [state.value for state in State]}

ANSWERS: dict[str, Schema] = {
    "Error": ERROR,
    "Server": object_of({"name": TEXT, "version": TEXT, "extensions": list_of(TEXT)}),
    "Live": object_of({"live": {"type": "boolean"}}),
    "Ready": object_of({"ready": {"type": "boolean"}}, {"name": TEXT}),
    "ModelMetadata": object_of(
        {
            "name": TEXT,
            "versions": list_of(TEXT),
            "platform": TEXT,
            "inputs": list_of(_TENSOR),
            "outputs": list_of(_TENSOR),
        }
    ),
    "InferResponse": object_of(
        {
            "model_name": TEXT,
            "model_version": TEXT,
            "outputs": list_of(
                object_of(
                    {"name": TEXT, "datatype": _DATATYPE, "shape": list_of(_COUNT)},
                    {
                        "data": {"type": "array", "description": "Flat; null where a number is not finite."},
                        "parameters": object_of({"binary_data_size": _COUNT}),
                    },
                )
            ),
        },
        {"id": TEXT},
    ),
    "RepositoryIndex": list_of(object_of({"name": TEXT, "version": TEXT, "state": _STATE, "reason": TEXT})),
    "Done": {"type": "object", "maxProperties": 0},
    "TFStatus": object_of(
        {
            "model_version_status": list_of(
                object_of(
                    {
                        "version": TEXT,
                        "state": {"type": "string", "enum": ["LOADING", "AVAILABLE", "UNLOADING", "END"]},
                        "status": object_of({"error_code": TEXT, "error_message": TEXT}),
                    }
                ),
                least=1,
            )
        }
    ),
    "TFMetadata": object_of(
        {
            "model_spec": object_of({"name": TEXT, "signature_name": TEXT, "version": TEXT}),
            "metadata": object_of(
                {"signature_def": object_of({"signature_def": object_of({SIGNATURE_NAME: _TF_SIGNATURE})})}
            ),
        }
    ),
    "PredictResponse": {
        "oneOf": [
            object_of({"predictions": {"type": "array", "description": "As many as there were instances."}}),
            object_of(
                {"outputs": {"type": ["array", "object"], "description": "By name if there are several."}}
            ),
        ]
    },
    "Status": object_of(
        {
            "mode": {"type": "string", "enum": ["replicas", "pipeline"]},
            "uptime": {"type": "number", "description": "Seconds."},
            "draining": {"type": "boolean"},
            "queue": _COUNT,
            "max_queue": _COUNT,
            "ranks": list_of({"type": "object"}),
            "models": list_of({"type": "object"}),
            "requests": object_of(
                {
                    "window": {"type": "number", "description": "Seconds that it looks back."},
                    "requests": _COUNT,
                    "errors": _COUNT,
                    "rate": {"type": "number", "description": "Requests per second."},
                    **{name: {**_SECONDS, "description": "Seconds."} for name in ("p50", "p95", "p99")},
                }
            ),
        }
    ),
}
