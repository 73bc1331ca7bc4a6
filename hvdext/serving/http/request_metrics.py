"""The outermost layer: counts every answer, and lets no exception out to a client."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hvdext.common.log import logger
from hvdext.serving.http.errors import error_response
from hvdext.serving.http.latency import Window
from hvdext.serving.http.metrics import Metrics

CLIENT_GONE = 499  # nobody sees it but the metrics; nginx's number
_log = logger("serve")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
]


@dataclass
class Call:
    """What a request turned out to be; endpoints fill it in."""

    protocol: str = ""
    model: str = ""
    version: str = ""


def call_of(scope: Scope) -> Call:
    """The request's, to fill in."""
    return scope["hvdext.call"]


class RequestMetrics:
    """Counts, times and logs; adds the headers that every answer carries.

    Args:
        app: the next.
        metrics: counts all answers.
        window: times those of models.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, window: Window):
        self._app = app
        self._metrics = metrics
        self._window = window

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Has the next one answer, and notes how that went."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = scope["hvdext.call"] = Call()
        started = time.perf_counter()
        status = 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                added = [header for header in _HEADERS if header[0] not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception:
            number = secrets.token_hex(4)
            _log.exception("error %s: %s %s", number, scope["method"], scope["path"])
            if not status:
                message = f"Something went wrong in the server; its log has more under {number}."
                await error_response(500, message)(scope, receive, send_noted)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.observe(call.model, call.version, call.protocol, status or CLIENT_GONE, seconds)
            if call.model:
                self._window.add(seconds, status == 200)
