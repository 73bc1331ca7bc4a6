"""Request bodies: read within limits of size, memory and time; gzip and deflate taken off."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator

import anyio
from starlette.requests import Request

from hvdext.serving.http.errors import BodyTooLarge, RequestTimeout, UnsupportedMediaType
from hvdext.serving.http.origin_guard import from_browser
from hvdext.serving.protocols.tensors import short
from hvdext.serving.service import InvalidRequest, QueueFull

_TAKEN = ("application/json", "application/octet-stream")
_WBITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_DISCARD_SECONDS = 2.0


class Bodies:
    """Reads bodies and knows how many bytes of them are held at this time.

    Args:
        max_bytes: of one body, after decompression.
        max_held: bytes of all bodies together, from their arrival to the answer.
        seconds: a body may take to arrive.
    """

    def __init__(self, max_bytes: int, max_held: int, seconds: float):
        self._max_bytes = max_bytes
        self._max_held = max_held
        self._seconds = seconds
        self._held = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, most: int | None = None) -> AsyncIterator[bytes]:
        """The body, counted as held until the block ends.

        Args:
            request: whose.
            most: bytes that this one may have; None: what any may.

        Raises:
            UnsupportedMediaType: if it is neither JSON nor binary tensors, or in an unknown encoding.
            BodyTooLarge: if it is, or says it is, larger than the limit.
            RequestTimeout: if it does not arrive in time.
            InvalidRequest: if it cannot be decompressed.
            QueueFull: if the bodies of all requests would take too much memory.
        """
        check_media_type(request)
        limit = self._max_bytes if most is None else min(most, self._max_bytes)
        decoder = _Decoder(request.headers.get("content-encoding", "identity"), limit)
        held = 0
        parts = []
        stream: AsyncGenerator[bytes, None] = request.stream()
        try:
            try:
                with anyio.fail_after(self._seconds):
                    _check_declared(request, limit)
                    async for chunk in stream:
                        part = decoder.feed(chunk)
                        held += len(part)
                        self._hold(len(part))
                        parts.append(part)
            except TimeoutError as error:
                raise RequestTimeout(f"The body must arrive within {self._seconds:g} s.") from error
            except BodyTooLarge:
                parts.clear()
                await _discard(request, stream, limit)
                raise
            decoder.end()
            yield b"".join(parts) if len(parts) > 1 else (parts[0] if parts else b"")
        finally:
            self._held -= held

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > self._max_held:
            raise QueueFull(
                f"The requests that are being answered hold {self._max_held} bytes, the most that may be. "
                "Try again later."
            )


def check_media_type(request: Request) -> None:
    """Is the body of a kind that is read? One that says nothing is taken.

    What `curl -d` sends by itself, a form, is taken for JSON as TensorFlow Serving takes it, except from a
    browser: there it is what pages of other sites can send without asking.

    Raises:
        UnsupportedMediaType: if not.
    """
    value = request.headers.get("content-type", "")
    name, _, parameters = value.lower().partition(";")
    name = name.strip()
    form = name == "application/x-www-form-urlencoded" and not from_browser(request)
    charset = parameters.partition("charset=")[2].partition(";")[0].strip(' "')
    known = not name or name in _TAKEN or (name.startswith("application/") and name.endswith("+json")) or form
    if not known or charset not in ("", "utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(
            f"The Content-Type must be {' or '.join(_TAKEN)}, the text in UTF-8. Received: {short(value)}."
        )


def _check_declared(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body must not exceed {max_bytes} bytes after decompression.")


async def _discard(request: Request, stream: AsyncGenerator[bytes, None], limit: int) -> None:
    """Lets a client that only reads after writing see the answer: its bytes are dropped, within limits."""
    if "expect" in request.headers:
        return  # it waits for leave to send
    with anyio.move_on_after(_DISCARD_SECONDS):
        async for chunk in stream:
            limit -= len(chunk)
            if limit < 0:
                return


class _Decoder:
    """Takes an encoding off, part by part, never giving more than the limit and one byte."""

    def __init__(self, encoding: str, max_bytes: int):
        encoding = encoding.strip().lower()
        if encoding not in ("identity", "", *_WBITS):
            raise UnsupportedMediaType(
                f"The Content-Encoding must be gzip, deflate or identity. Received: {short(encoding)}."
            )
        self._zlib = zlib.decompressobj(_WBITS[encoding]) if encoding in _WBITS else None
        self._max_bytes = max_bytes
        self._given = 0

    def feed(self, chunk: bytes) -> bytes:
        if self._zlib is not None and chunk:
            try:
                chunk = self._zlib.decompress(chunk, self._max_bytes + 1 - self._given)
            except zlib.error as error:
                raise InvalidRequest(f"The body cannot be decompressed: {error}.") from error
            if self._zlib.unused_data:  # at once: zlib would gather, and copy again, all that follows
                raise InvalidRequest(
                    "The compressed body must be one stream. Received: more bytes after its end."
                )
        self._given += len(chunk)
        if self._given > self._max_bytes:
            raise _too_large(self._max_bytes)
        return chunk

    def end(self) -> None:
        if self._zlib is not None and not self._zlib.eof:
            raise InvalidRequest("The compressed body ends early.")
