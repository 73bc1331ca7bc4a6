"""API keys: read from a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from hvdext.serving.http.errors import error_response

MIN_LENGTH = 16  # characters


def read_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The keys of a file: one per line; empty lines and those that begin with # do not count.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if everyone may read it, others may write it, or a key is too short or holds spaces or
            characters that a header cannot carry; if there is no key. The message never shows a key.
    """
    path = Path(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IROTH | stat.S_IWOTH | stat.S_IWGRP):
        raise ValueError(
            f"The key file must not be readable by everyone, nor writable by others than its owner: "
            f"chmod 600 {path}. Received: mode {mode:04o}."
        )
    keys = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key) < MIN_LENGTH or not all("!" <= character <= "~" for character in key):
            raise ValueError(
                f"A key must be {MIN_LENGTH} or more printable ASCII characters without spaces. "
                f"Received: line {number} of {path}, {len(key)} characters."
            )
        keys.append(key)
    if not keys:
        raise ValueError(f"The key file must hold one key per line. Received: none in {path}.")
    return tuple(keys)


class ApiKeyGuard:
    """Answers 401 without a key, except at paths that are free.

    Args:
        app: the next.
        keys: any of them opens; several let keys be changed without a gap.
        free: paths that need none.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], free: Collection[str]):
        self._app = app
        self._digests = [_digest(key) for key in keys]
        self._free = frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers itself, or has the next one answer."""
        if scope["type"] != "http" or scope["path"] in self._free or self._opens(Request(scope)):
            await self._app(scope, receive, send)
            return
        message = "An API key is needed, in the header `Authorization: Bearer KEY` or `X-API-Key: KEY`."
        headers = {"WWW-Authenticate": 'Bearer realm="hvdext"'}
        await error_response(401, message, headers)(scope, receive, send)

    def _opens(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = request.headers.get("x-api-key", "")
        received = _digest(key.strip())
        # All are compared, and digests of one length: the time says nothing of which key is near.
        return sum([hmac.compare_digest(received, digest) for digest in self._digests]) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
