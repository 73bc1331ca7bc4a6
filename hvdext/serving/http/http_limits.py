"""HTTP connections with limits of size and time that hold before anything is known of who is calling."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 1 << 16
MESSAGE_SECONDS = 60.0
_TEXT = b'{"error": "The request line and the headers must not exceed %d bytes."}'
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%b"
)


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's protocol, for clients that send too much outside of bodies, or nothing.

    Bytes: a head that grows beyond `MAX_HEAD_BYTES` is answered with 431; so is what a chunked body has
    between its parts and behind them.

    Time: a connection that has nothing to be answered is closed when it has not sent a whole message for
    `MESSAGE_SECONDS`. While it is being answered, the application limits how long its body may take. Between
    an answer and the next message uvicorn's `timeout_keep_alive` holds.
    """

    _between = 0  # bytes since the last end of a head, or of a piece of a body
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a message."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no longer."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses what has come, in pieces of which none goes beyond the limit."""
        while data and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._between
            piece, data = data[:room], data[room:]
            self._between += len(piece)
            super().data_received(piece)
            if self._between >= MAX_HEAD_BYTES:
                self._refuse()
        if self._between and self._timer is None:  # empty lines before a message
            self._wait()

    def on_message_begin(self) -> None:
        """Gives the message its time."""
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        """Has it answered."""
        self._between = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Passes a piece of a body on."""
        self._between = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Leaves the wait for the next message to uvicorn, which begins it with the end of the answer."""
        super().on_message_complete()
        self._between = 0
        self._stop()
        if not self._answering:  # it was answered before its end, which has stopped uvicorn's wait
            self._wait()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(MESSAGE_SECONDS, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if self._answering:
            self._wait()
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self) -> None:
        if self._answering:  # nothing can be said within an answer
            self.transport.abort()
        elif not self.transport.is_closing():
            text = _TEXT % MAX_HEAD_BYTES
            self.transport.write(_REFUSAL % (len(text), text))
            self.transport.close()
