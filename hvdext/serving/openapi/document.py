"""The description of everything the server answers, as OpenAPI 3.1; made from the models it has."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hvdext.serving.openapi import examples
from hvdext.serving.openapi.operations import Operations, answer, body_of
from hvdext.serving.openapi.requests import (
    GENERIC_INFER_REQUEST,
    GENERIC_PREDICT_REQUEST,
    infer_request,
    predict_request,
)
from hvdext.serving.openapi.responses import ANSWERS
from hvdext.serving.openapi.schemas import ANY_LIST, TEXT, Schema, object_of
from hvdext.serving.service import ModelVersion, Signature

_MOST_EXAMPLE_VALUES = 1000  # larger inputs are not shown as an example
_BODY = (400, 408, 413, 415, 503)
_V2, _TF, _SITE = "Open Inference Protocol v2", "TensorFlow Serving", "Server"


def document(versions: Sequence[ModelVersion], with_keys: bool) -> dict[str, Any]:
    """The description.

    Args:
        versions: of all models; without any, requests are described as the protocols do, for any model.
        with_keys: True if the server asks for a key.
    """
    signatures = _signatures(versions)
    described = Operations(with_keys, sorted({version.name for version in versions}))
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
            **_tf_paths(described, signatures, _other_requests(versions)),
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
        if version.signature is None:
            continue
        signature = replace(version.signature, alone="")  # which no request tells
        if signature not in found.values():
            name = version.name if version.name not in found else f"{version.name} {version.version}"
            found[name] = signature
    return found


def _other_requests(versions: Sequence[ModelVersion]) -> list[Schema]:
    """Requests by other signatures than the default, each once."""
    found: list[Schema] = []
    for version in versions:
        for name, signature in version.others.items():
            schema = predict_request(signature, name)
            if schema not in found:
                found.append(schema)
    return found


def _examples(signatures: dict[str, Signature], make: Any) -> dict[str, Any]:
    return {
        name: {"value": make(signature)}
        for name, signature in signatures.items()
        if examples.values(signature) <= _MOST_EXAMPLE_VALUES
    }


def _v2_paths(described: Operations, signatures: dict[str, Signature]) -> dict[str, Any]:
    operation = described.operation
    body = body_of(
        [infer_request(signature) for signature in signatures.values()] or [GENERIC_INFER_REQUEST],
        _examples(signatures, examples.v2_example),
    )
    binary: Schema = {"schema": {"type": "string", "format": "binary"}}
    infer_answer = answer("InferResponse", "In binary if an output was asked for so: JSON, then the tensors.")
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
    live = {200: answer("Live", "It answers."), 503: answer("Live", "It drains.")}
    ready = {200: answer("Ready", "All models are ready."), 503: answer("Ready", "Not yet, or no more.")}
    paths: dict[str, Any] = {
        "/v2": {"get": operation(_V2, "The server", {200: answer("Server")})},
        "/v2/health/live": {"get": operation(_V2, "Does the server run?", live, free=True)},
        "/v2/health/ready": {"get": operation(_V2, "Can it answer for every model?", ready, free=True)},
    }
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        model_ready = {200: answer("Ready", "It is."), 503: answer("Ready", "It is not.")}
        infer = operation(
            _V2,
            "Infer",
            {200: infer_answer},
            (404, 500, 504, *_BODY),
            description=binary_request,
            requestBody=body,
        )
        of_model = {
            path: operation(_V2, "Inputs and outputs of a model", {200: answer("ModelMetadata")}, (404, 503)),
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
    for path, (summary, name, schema, errors) in repository.items():
        post = operation(
            _V2,
            summary,
            {200: answer(name)},
            errors,
            requestBody={"content": {"application/json": {"schema": schema}}},
        )
        paths[f"/v2/repository/{path}"] = {"parameters": described.parameters(path), "post": post}
    return paths


def _tf_paths(
    described: Operations, signatures: dict[str, Signature], others: list[Schema]
) -> dict[str, Any]:
    operation = described.operation
    body = body_of(
        [*(predict_request(signature) for signature in signatures.values()), *others]
        or [GENERIC_PREDICT_REQUEST],
        _examples(signatures, examples.rows_example),
    )
    paths: dict[str, Any] = {
        "/v1/models": {"get": operation(_TF, "The models' names", {200: answer("ModelNames")})}
    }
    for path in ("/v1/models/{model}", "/v1/models/{model}/versions/{version}"):
        parameters = described.parameters(path)
        errors = (404, 500, 504, *_BODY)
        status = operation(_TF, "State of the versions", {200: answer("TFStatus")}, (404,))
        metadata = operation(_TF, "Inputs and outputs of a model", {200: answer("TFMetadata")}, (404, 503))
        predict = operation(_TF, "Predict", {200: answer("PredictResponse")}, errors, requestBody=body)
        paths[path] = {"parameters": parameters, "get": status}
        paths[path + "/metadata"] = {"parameters": parameters, "get": metadata}
        paths[path + ":predict"] = {"parameters": parameters, "post": predict}
    return paths


def _site_paths(described: Operations) -> dict[str, Any]:
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
    home = page("text/html")
    home[200]["content"]["application/json"] = {"schema": object_of({"status": TEXT})}
    paths: dict[str, Any] = {
        "/": {
            "get": operation(
                _SITE,
                "A page that shows the server and tries a model; asked for JSON: is it alive?",
                {**home, 503: {**home[200], "description": "It drains (in JSON only)."}},
                free=True,
            )
        },
        "/docs": {"get": operation(_SITE, "This description, to read", page("text/html"), free=True)},
        "/openapi.json": {"get": operation(_SITE, "This description", this)},
        "/metrics": {"get": operation(_SITE, "Metrics for Prometheus", metrics)},
        "/status": {
            "get": operation(_SITE, "Ranks, models, queue, rate and latency", {200: answer("Status")})
        },
    }
    example: Schema = object_of({"inputs": ANY_LIST})
    answers = {200: {"description": "It.", "content": {"application/json": {"schema": example}}}}
    for path in ("/examples/{model}", "/examples/{model}/versions/{version}"):
        get = operation(_SITE, "An example of a request to infer", answers, (404, 503))
        paths[path] = {"parameters": described.parameters(path), "get": get}
    return paths
