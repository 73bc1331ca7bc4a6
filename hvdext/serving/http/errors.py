"""Errors as clients see them: both protocols have the body {"error": "..."}."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hvdext.serving.protocols.json_text import write_json
from hvdext.serving.service import ServiceError


class RequestTimeout(ServiceError):
    """The body did not arrive in time."""

    status = 408


class BodyTooLarge(ServiceError):
    """The body is larger than the server takes."""

    status = 413


class UnsupportedMediaType(ServiceError):
    """The body is of a kind, or in an encoding, that the server does not read."""

    status = 415


class JSONResponse(Response):
    """JSON by orjson, NumPy arrays included."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        """The text."""
        return write_json(content)


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """The protocols' error body."""
    return JSONResponse({"error": message}, status, headers)


def on_service_error(_: Request, error: Exception) -> Response:
    """The answer to what the service, or the reading of a request, raised."""
    assert isinstance(error, ServiceError)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if isinstance(error, RequestTimeout | BodyTooLarge):
        headers["Connection"] = "close"  # the rest of the body is not read
    return error_response(error.status, str(error), headers)


def on_http_error(request: Request, error: Exception) -> Response:
    """The answer where no route fits the path or the method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = ", ".join(sorted(method.strip() for method in headers["Allow"].split(",")))
        message = f"This path takes {allowed}. Received: {request.method[:20]}."
        return error_response(405, message, {"Allow": allowed})
    return error_response(
        error.status_code, "There is nothing at this path; GET /docs lists all paths.", headers
    )


HANDLERS = {ServiceError: on_service_error, HTTPException: on_http_error}
