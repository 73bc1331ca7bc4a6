"""What pages of other sites could make a visitor's browser send is refused.

A server on loopback is within reach of every page that its user opens. Such a page is known by headers that
browsers set and pages cannot: `Sec-Fetch-Site` and `Origin`. A page may also give its own host name the
address 127.0.0.1 (DNS rebinding) and count as same-origin; then the `Host` header is not one of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from hvdext.serving.http.errors import error_response
from hvdext.serving.protocols.tensors import short

_SAFE = ("GET", "HEAD", "OPTIONS")


def from_browser(request: Request) -> bool:
    """Does a page of some site stand behind the request?"""
    return "origin" in request.headers or "sec-fetch-site" in request.headers


class OriginGuard:
    """Answers 403 to requests that a page of another site makes.

    Args:
        app: the next.
        allowed_hosts: names (without port) that the server is reached by; empty: any.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str]):
        self._app = app
        self._allowed_hosts = frozenset(_host_name(host) for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself, or has the next one answer."""
        if scope["type"] == "http":
            refusal = self._refusal(Request(scope))
            if refusal:
                await error_response(403, refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> str:
        host = request.headers.get("host", "")
        if self._allowed_hosts and _host_name(host) not in self._allowed_hosts:
            return f"The Host must be {' or '.join(sorted(self._allowed_hosts))}. Received: {short(host)}."
        if request.method not in _SAFE and not _same_site(request, host):
            return "Pages of other sites may not use this server."
        return ""


def _same_site(request: Request, host: str) -> bool:
    fetch_site = request.headers.get("sec-fetch-site")
    if fetch_site is not None:
        return fetch_site in ("same-origin", "none")
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


def _host_name(host: str) -> str:
    """Without the port; an IPv6 address without its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host if host.count(":") > 1 else host.partition(":")[0]
