"""The description of everything the server answers, as OpenAPI 3.1; made from the models it has."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from hvdext.inference.serving import examples
from hvdext.inference.serving.openapi_schemas import (
    ANSWERS,
    GENERIC_INFER_REQUEST,
    GENERIC_PREDICT_REQUEST,
    TEXT,
    Schema,
    any_of,
    infer_request,
    object_of,
    predict_request,
)
from hvdext.inference.serving.service import ModelVersion, Signature

_MOST_EXAMPLE_VALUES = 1000  # larger inputs are not shown as an example
_ERRORS = {
    400: "The request does not fit the model or the protocol.",
    401: "An API key is needed.",
    403: "The host is not one of this server's, or a page of another site asks.",
    404: "No model, or no version, of that name.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of a kind or in an encoding that is not read.",
    500: "The model failed on this request, or the rank that had it was lost.",
    503: "No rank can answer now, the queue is full, or the server drains: try again after `Retry-After`.",
    504: "The deadline of the request has passed.",
}
_BODY = (400, 408, 413, 415, 503)
_V2, _TF, _SITE = "Open Inference Protocol v2", "TensorFlow Serving", "Server"


def document(versions: Sequence[ModelVersion], with_keys: bool) -> dict[str, Any]:
    """The description.

    Args:
        versions: of all models; without any, requests are described as the protocols do, for any model.
        with_keys: True if the server asks for a key.
    """
    signatures = _signatures(versions)
    described = _Described(with_keys, sorted({version.name for version in versions}))
    security: list[dict] = [{"bearer": []}, {"header": []}] if with_keys else []
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hvdext serve",
            "version": importlib.metadata.version("hvdext"),
            "description": "Models on several ranks. Numbers that are not finite come as null in JSON. "
            'All errors have the body {"error": "..."}.',
        },
        "servers": [{"url": "/"}],
        "security": security,
        "paths": {
            **_v2_paths(described, signatures),
            **_tf_paths(described, signatures),
            **_site_paths(described),
        },
        "components": {
            "schemas": ANSWERS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _signatures(versions: Sequence[ModelVersion]) -> dict[str, Signature]:
    """Different signatures by a name for each: the model's, with the version if it has several."""
    found: dict[str, Signature] = {}
    for version in versions:
        if version.signature is not None and version.signature not in found.values():
            name = version.name if version.name not in found else f"{version.name} {version.version}"
            found[name] = version.signature
    return found


class _Described:
    """Makes operations; knows what all of them share."""

    def __init__(self, with_keys: bool, models: list[str]):
        self._common = (401, 403) if with_keys else (403,)
        schema: Schema = {"type": "string", "pattern": "^[^/:]+$"}
        self._model = {"type": "string", "enum": models} if models else schema

    def parameters(self, path: str) -> list[dict]:
        found = []
        if "{model}" in path:
            found.append({"name": "model", "in": "path", "required": True, "schema": self._model})
        if "{version}" in path:
            version = {"type": "string", "pattern": "^[1-9][0-9]{0,8}$", "examples": ["1"]}
            found.append({"name": "version", "in": "path", "required": True, "schema": version})
        return found

    def operation(
        self,
        tag: str,
        summary: str,
        answers: dict[int, dict],
        errors: Sequence[int] = (),
        free: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        codes = sorted(
            {*errors, *(code for code in self._common if not (free and code == 401))} - set(answers)
        )
        responses = {str(code): answer for code, answer in answers.items()}
        responses.update((str(code), _error(code)) for code in codes)
        operation = {"tags": [tag], "summary": summary, "responses": responses, **more}
        return {**operation, "security": []} if free else operation


def _error(code: int) -> dict[str, Any]:
    found: dict[str, Any] = {"description": _ERRORS[code], **_json("Error")}
    if code == 503:
        found["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    if code == 401:
        found["headers"] = {"WWW-Authenticate": {"schema": TEXT}}
    return found


def _json(name: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}


def _answer(name: str, description: str = "The answer.") -> dict[str, Any]:
    return {"description": description, **_json(name)}


def _body(schemas: list[Schema], example: dict[str, Any]) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": any_of(schemas)}
    if example:
        media["examples"] = example
    return {"required": True, "content": {"application/json": media}}


def _examples(signatures: dict[str, Signature], make: Any) -> dict[str, Any]:
    return {
        name: {"value": make(signature)}
        for name, signature in signatures.items()
        if examples.values(signature) <= _MOST_EXAMPLE_VALUES
    }


def _v2_paths(described: _Described, signatures: dict[str, Signature]) -> dict[str, Any]:
    operation = described.operation
    body = _body(
        [infer_request(signature) for signature in signatures.values()] or [GENERIC_INFER_REQUEST],
        _examples(signatures, examples.v2_example),
    )
    binary: Schema = {"schema": {"type": "string", "format": "binary"}}
    infer_answer = _answer(
        "InferResponse", "In binary if an output was asked for so: JSON, then the tensors."
    )
    infer_answer["content"]["application/octet-stream"] = binary
    infer_answer["headers"] = {
        "Inference-Header-Content-Length": {
            "schema": {"type": "integer"},
            "description": "Bytes of JSON that a binary answer begins with.",
        }
    }
    binary_request = (
        "Inputs may follow the JSON in binary (`binary_data_size` among the input's parameters); the header "
        "`Inference-Header-Content-Length` then says how long the JSON is."
    )
    settings: Schema = {"type": "object", "properties": {"ready": {"type": ["boolean", "null"]}}}
    unload: Schema = {
        "type": "object",
        "properties": {
            "parameters": {
                "type": ["object", "null"],
                "properties": {
                    "version": {"type": ["integer", "null"], "minimum": 1},
                    "unload_dependents": {"type": "boolean"},
                },
                "additionalProperties": False,
            }
        },
    }
    load: Schema = {
        "type": "object",
        "properties": {"parameters": {"type": ["object", "null"], "maxProperties": 0}},
    }
    live = {200: _answer("Live", "It answers."), 503: _answer("Live", "It drains.")}
    ready = {200: _answer("Ready", "All models are ready."), 503: _answer("Ready", "Not yet, or no more.")}
    paths: dict[str, Any] = {
        "/v2": {"get": operation(_V2, "The server", {200: _answer("Server")})},
        "/v2/health/live": {"get": operation(_V2, "Does the server run?", live, free=True)},
        "/v2/health/ready": {"get": operation(_V2, "Can it answer for every model?", ready, free=True)},
    }
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        model_ready = {200: _answer("Ready", "It is."), 503: _answer("Ready", "It is not.")}
        infer = operation(
            _V2,
            "Infer",
            {200: infer_answer},
            (404, 500, 504, *_BODY),
            description=binary_request,
            requestBody=body,
        )
        of_model = {
            path: operation(
                _V2, "Inputs and outputs of a model", {200: _answer("ModelMetadata")}, (404, 503)
            ),
            path + "/ready": operation(_V2, "Can a model answer?", model_ready, (404,)),
        }
        for inner, found in of_model.items():
            paths[inner] = {"parameters": described.parameters(path), "get": found}
        paths[path + "/infer"] = {"parameters": described.parameters(path), "post": infer}
    repository = {
        "index": ("Models and versions that are there, loaded or not", "RepositoryIndex", settings, _BODY),
        "models/{model}/load": ("Load versions that are not loaded yet", "Done", load, (404, 500, *_BODY)),
        "models/{model}/unload": ("Unload a version, or all", "Done", unload, (404, 500, *_BODY)),
    }
    for path, (summary, answer, schema, errors) in repository.items():
        post = operation(
            _V2,
            summary,
            {200: _answer(answer)},
            errors,
            requestBody={"content": {"application/json": {"schema": schema}}},
        )
        paths[f"/v2/repository/{path}"] = {"parameters": described.parameters(path), "post": post}
    return paths


def _tf_paths(described: _Described, signatures: dict[str, Signature]) -> dict[str, Any]:
    operation = described.operation
    body = _body(
        [predict_request(signature) for signature in signatures.values()] or [GENERIC_PREDICT_REQUEST],
        _examples(signatures, examples.rows_example),
    )
    paths: dict[str, Any] = {}
    for path in ("/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
        parameters = described.parameters(path)
        errors = (404, 500, 504, *_BODY)
        status = operation(_TF, "State of the versions", {200: _answer("TFStatus")}, (404,))
        metadata = operation(_TF, "Inputs and outputs of a model", {200: _answer("TFMetadata")}, (404, 503))
        predict = operation(_TF, "Predict", {200: _answer("PredictResponse")}, errors, requestBody=body)
        paths[path] = {"parameters": parameters, "get": status}
        paths[path + "/metadata"] = {"parameters": parameters, "get": metadata}
        paths[path + ":predict"] = {"parameters": parameters, "post": predict}
    return paths


def _site_paths(described: _Described) -> dict[str, Any]:
    operation = described.operation

    def page(media_type: str, *others: str) -> dict[int, dict]:
        return {
            200: {"description": "It.", "content": {name: {"schema": TEXT} for name in (media_type, *others)}}
        }

    description: Schema = object_of(
        {"openapi": TEXT, "info": {"type": "object"}, "paths": {"type": "object"}}
    )
    this = {200: {"description": "It.", "content": {"application/json": {"schema": description}}}}
    metrics = page("text/plain", "application/openmetrics-text")
    paths: dict[str, Any] = {
        "/": {
            "get": operation(
                _SITE, "A page that shows the server and tries a model", page("text/html"), free=True
            )
        },
        "/docs": {"get": operation(_SITE, "This description, to read", page("text/html"), free=True)},
        "/openapi.json": {"get": operation(_SITE, "This description", this)},
        "/metrics": {"get": operation(_SITE, "Metrics for Prometheus", metrics)},
        "/status": {
            "get": operation(_SITE, "Ranks, models, queue, rate and latency", {200: _answer("Status")})
        },
    }
    example: Schema = object_of({"inputs": {"type": "array"}})
    answers = {200: {"description": "It.", "content": {"application/json": {"schema": example}}}}
    for path in ("/examples/{model}", "/examples/{model}/versions/{version}"):
        get = operation(_SITE, "An example of a request to infer", answers, (404, 503))
        paths[path] = {"parameters": described.parameters(path), "get": get}
    return paths
