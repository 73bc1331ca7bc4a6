"""Everything that a server says over HTTP, as one ASGI application."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware

from hvdext.serving.http import api_site, api_tf, api_v2
from hvdext.serving.http.api_keys import ApiKeyGuard
from hvdext.serving.http.bodies import Bodies
from hvdext.serving.http.errors import HANDLERS
from hvdext.serving.http.latency import Window
from hvdext.serving.http.metrics import Metrics
from hvdext.serving.http.offload import Offload
from hvdext.serving.http.origin_guard import OriginGuard
from hvdext.serving.http.request_metrics import RequestMetrics
from hvdext.serving.service import Service

MEBIBYTE = 2**20


def make_app(
    service: Service,
    *,
    api_keys: Sequence[str] = (),
    max_request_bytes: int = 64 * MEBIBYTE,
    max_held_bytes: int = 512 * MEBIBYTE,
    receive_seconds: float = 60.0,
    allowed_hosts: Sequence[str] = (),
) -> Starlette:
    """The application: both protocols, their description, metrics and the page.

    Args:
        service: the models that answer.
        api_keys: any of them is asked for, as `keys.read_keys` reads them; empty: none is needed.
        max_request_bytes: of one body, after decompression.
        max_held_bytes: of all bodies that wait for their answers; what exceeds them gets 503.
        receive_seconds: that a body may take to arrive; also that a large one may wait for others to be read.
        allowed_hosts: names, without port, that the `Host` of a request may be; empty: any. For a server on
            loopback give ("localhost", "127.0.0.1", "::1"): no other site can then pass for it in a browser.

    Raises:
        ValueError: if a limit is not above 0, or all bodies may not hold as much as one.
    """
    for name, limit in (("max_request_bytes", max_request_bytes), ("receive_seconds", receive_seconds)):
        if limit <= 0:
            raise ValueError(f"`{name}` must be above 0. Received: {limit}.")
    if max_held_bytes < max_request_bytes:
        raise ValueError(
            f"`max_held_bytes` must be at least `max_request_bytes`, {max_request_bytes}. "
            f"Received: {max_held_bytes}."
        )
    metrics, window = Metrics(service), Window()
    bodies = Bodies(max_request_bytes, max_held_bytes, receive_seconds)
    reading, writing = Offload(receive_seconds), Offload(receive_seconds)
    guards = [Middleware(ApiKeyGuard, api_keys, api_site.FREE_PATHS)] if api_keys else []
    app = Starlette(
        routes=[
            *api_v2.routes(service, bodies, reading, writing),
            *api_tf.routes(service, bodies, reading, writing),
            *api_site.routes(service, metrics, window, with_keys=bool(api_keys)),
        ],
        middleware=[
            Middleware(RequestMetrics, metrics, window),
            Middleware(OriginGuard, allowed_hosts),
            *guards,
        ],
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False
    return app
