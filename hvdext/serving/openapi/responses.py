"""JSON Schemas of answers: the same for all models."""

from __future__ import annotations

from hvdext.serving.openapi.schemas import ANY_LIST, DATATYPE, TEXT, Schema, list_of, object_of
from hvdext.serving.service import DEFAULT_SIGNATURE, State

_COUNT: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": ["number", "null"], "minimum": 0}
_TENSOR = object_of(
    {"name": TEXT, "datatype": DATATYPE, "shape": list_of({"type": "integer", "minimum": -1})},
    {"parameters": object_of({"optional": {"type": "boolean"}})},
)
_TF_TENSORS: Schema = {
    "type": "object",
    "additionalProperties": object_of({"dtype": TEXT, "tensor_shape": {"type": "object"}, "name": TEXT}),
}
_TF_SIGNATURE = object_of({"inputs": _TF_TENSORS, "outputs": _TF_TENSORS, "method_name": TEXT})
_STATE: Schema = {"type": "string", "enum": [state.value for state in State]}

ANSWERS: dict[str, Schema] = {
    "Error": object_of(
        {"error": {"type": "string", "description": "What was expected, and what was received."}}
    ),
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
            "parameters": object_of(
                {
                    "requests_together": {
                        "type": "boolean",
                        "description": "Whether rows of several requests may be computed together.",
                    },
                    "reason": {"type": "string", "description": "Why not; empty if they may."},
                }
            ),
        }
    ),
    "InferResponse": object_of(
        {
            "model_name": TEXT,
            "model_version": TEXT,
            "outputs": list_of(
                object_of(
                    {"name": TEXT, "datatype": DATATYPE, "shape": list_of(_COUNT)},
                    {
                        "data": {**ANY_LIST, "description": "Flat; null where a number is not finite."},
                        "parameters": object_of({}, {"binary_data_size": _COUNT, "content_type": TEXT}),
                    },
                )
            ),
        },
        {"id": TEXT},
    ),
    "RepositoryIndex": list_of(object_of({"name": TEXT, "version": TEXT, "state": _STATE, "reason": TEXT})),
    "Done": {"type": "object", "maxProperties": 0},
    "ModelNames": object_of({"models": list_of(TEXT)}),
    "TFStatus": object_of(
        {
            "name": TEXT,
            "ready": {"type": "boolean", "description": "Whether one of these versions answers."},
            "model_version_status": list_of(
                object_of(
                    {
                        "version": TEXT,
                        "state": {"type": "string", "enum": ["LOADING", "AVAILABLE", "UNLOADING", "END"]},
                        "status": object_of({"error_code": TEXT, "error_message": TEXT}),
                    }
                ),
                least=1,
            ),
        }
    ),
    "TFMetadata": object_of(
        {
            "model_spec": object_of({"name": TEXT, "signature_name": TEXT, "version": TEXT}),
            "metadata": object_of(
                {
                    "signature_def": object_of(
                        {
                            "signature_def": object_of(
                                {DEFAULT_SIGNATURE: _TF_SIGNATURE}, additionalProperties=_TF_SIGNATURE
                            )
                        }
                    )
                }
            ),
        }
    ),
    "PredictResponse": {
        "oneOf": [
            object_of({"predictions": {**ANY_LIST, "description": "As many as there were instances."}}),
            object_of(
                {
                    "outputs": {
                        "anyOf": [ANY_LIST, {"type": "object"}],
                        "description": "By name if there are several.",
                    }
                }
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
