"""JSON Schemas of requests, made from what the models take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hvdext.serving.openapi.schemas import ANY_LIST, DATATYPE, TEXT, Schema, any_of, list_of, object_of
from hvdext.serving.protocols.tensors import DTYPES
from hvdext.serving.service import DEFAULT_SIGNATURE, Signature, TensorSpec

_PARAMETERS: Schema = {"type": ["object", "null"], "additionalProperties": True}
_BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


def _value(spec: TensorSpec, base64: bool) -> Schema:
    dtype = DTYPES[spec.datatype]
    if dtype.kind == "b":
        return {"type": "boolean"}
    if dtype.kind == "O":
        encoded = object_of({"b64": {"type": "string", "pattern": _BASE64}}, maxProperties=1)
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
        "properties": {
            "binary_data": {"type": ["boolean", "null"]},
            "content_type": {"type": ["string", "null"], "description": "base64, for BYTES in JSON."},
        },
    }
    output = object_of({"name": {"type": "string", "enum": names}}, {"parameters": output_parameters})
    inputs = list_of(any_of(map(_input, signature.inputs)), least=max(1, len(_required(signature))))
    inputs["maxItems"] = len(signature.inputs)
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
        "items": {"type": "integer"},
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


def _required(signature: Signature) -> list[TensorSpec]:
    return [spec for spec in signature.inputs if not spec.optional]


def _named(signature: Signature, schema_of: Callable[[TensorSpec, bool], Schema]) -> Schema:
    required = {spec.name: schema_of(spec, True) for spec in _required(signature)}
    optional = {spec.name: schema_of(spec, True) for spec in signature.inputs if spec.optional}
    return object_of(required, optional, additionalProperties=False, minProperties=1)


def predict_request(signature: Signature, called: str = DEFAULT_SIGNATURE) -> Schema:
    """A request of TensorFlow Serving to a model: rows or columns.

    Args:
        signature: what the model takes.
        called: the signature's name.
    """
    row, columns = _named(signature, _row), _named(signature, _rows)
    bare = [signature.bare] if signature.bare is not None else []
    rows_of = any_of([list_of(_row(spec, True), least=1) for spec in bare] + [list_of(row, least=1)])
    columns_of = any_of([_rows(spec, True) for spec in bare] + [columns])
    # Other than the default it must be said.
    named: Schema = {"const": called} if called != DEFAULT_SIGNATURE else {"enum": [called, "", None]}
    required = ["signature_name"] if called != DEFAULT_SIGNATURE else []

    def either(form: str, holds: Schema, other: str) -> Schema:
        found = object_of({form: holds}, {"signature_name": named})
        return {**found, "required": [form, *required], "not": {"required": [other]}}

    return {
        "oneOf": [either("instances", rows_of, "inputs"), either("inputs", columns_of, "instances")],
    }


GENERIC_INFER_REQUEST = object_of(
    {
        "inputs": list_of(
            object_of(
                {
                    "name": TEXT,
                    "datatype": DATATYPE,
                    "shape": list_of({"type": "integer", "minimum": 1}, least=1),
                },
                {"data": ANY_LIST, "parameters": _PARAMETERS},
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
        object_of({"inputs": {"anyOf": [ANY_LIST, {"type": "object"}]}}, {"signature_name": TEXT}),
    ]
}
