"""The endpoints beside the protocols: the page, the description, metrics, status, examples."""

from __future__ import annotations

import importlib.resources

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from hvdext.serving.http import docs_page
from hvdext.serving.http.errors import JSONResponse
from hvdext.serving.http.handlers import found, signature_of
from hvdext.serving.http.latency import Window
from hvdext.serving.http.metrics import Metrics
from hvdext.serving.http.pages import content_security_policy
from hvdext.serving.http.paths import MODEL, VERSION
from hvdext.serving.openapi import document
from hvdext.serving.openapi.examples import v2_example
from hvdext.serving.service import Service

FREE_PATHS = ("/", "/docs", "/v2/health/live", "/v2/health/ready")


def routes(service: Service, metrics: Metrics, window: Window, with_keys: bool) -> list[Route]:
    """The routes.

    Args:
        service: the models.
        metrics: what `/metrics` gives.
        window: rate and latency for `/status`.
        with_keys: True if a key is needed: the pages, which need none, then tell nothing of the models.
    """
    site = _Site(service, metrics, window, with_keys)
    table = [
        ("/", site.page),
        ("/docs", site.docs),
        ("/openapi.json", site.openapi),
        ("/metrics", site.metrics),
        ("/status", site.status),
        (f"/examples/{MODEL}", site.example),
        (f"/examples/{MODEL}{VERSION}", site.example),
    ]
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in table]


class _Site:
    def __init__(self, service: Service, metrics: Metrics, window: Window, with_keys: bool):
        self._service = service
        self._metrics = metrics
        self._window = window
        self._with_keys = with_keys
        package = importlib.resources.files("hvdext.serving.http")
        self._page = package.joinpath("page.html").read_text(encoding="utf-8")

    async def page(self, request: Request) -> Response:
        """The page; for who asks for JSON only, what KServe's first protocol has there."""
        accepted = request.headers.get("accept", "")
        if "application/json" in accepted and "text/html" not in accepted:
            live = self._service.live
            return JSONResponse({"status": "alive" if live else "draining"}, 200 if live else 503)
        return _html(self._page)

    async def docs(self, _: Request) -> Response:
        versions = [] if self._with_keys else self._service.versions()
        return _html(docs_page.render(document.document(versions, self._with_keys)))

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document.document(self._service.versions(), self._with_keys))

    async def metrics(self, request: Request) -> Response:
        text, media_type = self._metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": media_type})

    async def status(self, _: Request) -> Response:
        return JSONResponse({**self._service.status(), "requests": self._window.summary()})

    async def example(self, request: Request) -> Response:
        return JSONResponse(v2_example(signature_of(found(request, self._service))))


def _html(text: str) -> Response:
    return HTMLResponse(text, headers={"Content-Security-Policy": content_security_policy(text)})
