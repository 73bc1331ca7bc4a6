"""Connections while the server drains: none stays open for a request that would find nobody."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hvdext.serving.service import Service


class CloseWhenDraining:
    """Has each connection close after its answer once the server drains.

    A client that keeps its connection would otherwise send the next request just when the server ends.

    Args:
        app: what answers.
        service: tells whether it drains.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, and marks the answer."""

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start" and not self._service.live:
                others = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
                message = {**message, "headers": [*others, (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_marked if scope["type"] == "http" else send)
