"""Requests at the level of ASGI, where a test decides what arrives, and when."""

import asyncio


async def call(app, path, receive, headers=(), method="POST"):
    """One request; the status and the body of its answer, (None, b"") without."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": list(headers),
        "root_path": "",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "http_version": "1.1",
    }
    await app(scope, receive, send)
    return (sent[0]["status"], sent[1]["body"]) if sent else (None, b"")


def receiving(body, leaves=None):
    """A client that sends a body and waits; once the event `leaves` is set it has gone."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if not messages:
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    return receive
