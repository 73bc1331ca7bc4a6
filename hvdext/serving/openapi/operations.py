"""Operations of the OpenAPI description: what is sent, and every status that is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hvdext.serving.openapi.schemas import TEXT, Schema, any_of

_ERRORS = {
    400: "The request does not fit the model or the protocol.",
    401: "An API key is needed.",
    403: "The host is not one of this server's, or a page of another site asks.",
    404: "No model, or no version, of that name.",
    408: "The body did not arrive in time, or the time that the request has set has passed.",
    413: "The body is too large.",
    415: "The body is of a kind or in an encoding that is not read.",
    500: "The model failed on this request, or the rank that had it was lost.",
    503: "No rank can answer now, the queue is full, or the server drains: try again after `Retry-After`.",
    504: "The server's limit for an answer has passed.",
}


class Operations:
    """Makes operations; knows what all of them share.

    Args:
        with_keys: True if the server asks for a key.
        models: names that a path may have; empty: any.
    """

    def __init__(self, with_keys: bool, models: list[str]):
        self._common = (401, 403) if with_keys else (403,)
        schema: Schema = {"type": "string", "pattern": "^[^/:]+$"}
        self._model = {"type": "string", "enum": models} if models else schema

    def parameters(self, path: str) -> list[dict]:
        """The path's."""
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
        """One operation.

        Args:
            tag: the group that it is shown in.
            summary: one line.
            answers: by status, those that are no errors.
            errors: statuses of errors, besides those that any request may get.
            free: True if it needs no key.
            **more: such as `requestBody`.
        """
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


def answer(name: str, description: str = "The answer.") -> dict[str, Any]:
    """An answer whose schema is among the document's, by name."""
    return {"description": description, **_json(name)}


def body_of(schemas: list[Schema], example: dict[str, Any]) -> dict[str, Any]:
    """A request's body in JSON: any of the schemas; examples by name."""
    media: dict[str, Any] = {"schema": any_of(schemas)}
    if example:
        media["examples"] = example
    return {"required": True, "content": {"application/json": media}}
