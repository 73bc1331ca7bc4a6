"""The front's end of a connection: frames in the event loop, from and to a caller that knows the token."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hvdext.serving.transport import handshake
from hvdext.serving.transport.frames import MAX_BODY, MAX_HEADER, Frame, FrameError, FrameReader, encode

HANDSHAKE_SECONDS = 10.0
PING_SECONDS = 5.0
SILENCE_SECONDS = 30.0  # of pings without an answer, after which the other side counts as lost


class Peer(asyncio.BufferedProtocol):
    """One connection.

    Args:
        token: the job's secret.
        check: called with the peer once it has proved to know the token; raises `handshake.Refused` if it
            is not wanted.
        arrived: called with the peer after that; sets `on_frame` and `on_lost`.

    Attributes:
        facts: who the caller says it is.
        host: the caller's address.
        given_up: whether it was this side that ended the connection.
        on_frame: called with each frame.
        on_lost: called once with the reason, when the connection has ended.
    """

    def __init__(self, token: str, check: Callable[[Peer], None], arrived: Callable[[Peer], None]):
        self.facts: dict[str, Any] = {}
        self.on_frame: Callable[[Frame], None] = lambda frame: None
        self.on_lost: Callable[[str], None] = lambda reason: None
        self.given_up = False
        self._token = token
        self._check = check
        self._arrived = arrived
        self._reader = FrameReader(handshake.MAX_HEADER, 0)
        self._challenge = handshake.challenge()
        self._known = False
        self._reason = "its connection has ended"

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> None:
        """Sends one frame; lost with the connection."""
        if not self._transport.is_closing():
            self._transport.writelines(encode(header, tensors))

    def end(self, reason: str) -> None:
        """Ends the connection at once."""
        if not self._transport.is_closing():
            self._reason = reason
            self.given_up = True
            self._transport.abort()

    def connection_made(self, transport):
        """Asks the caller to prove that it knows the token."""
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._unanswered = 0
        self._timer = self._loop.call_later(HANDSHAKE_SECONDS, self.end, "it did not say who it is")
        self.host = transport.get_extra_info("peername")[0]
        self.send(self._challenge)

    def get_buffer(self, sizehint):
        """Where the next bytes belong."""
        return self._reader.buffer()

    def buffer_updated(self, count):
        """Handles the frame that is complete now, if one is."""
        self._unanswered = 0
        try:
            frame = self._reader.received(count)
            if frame is None:
                return
            if not self._known:
                self._greet(frame)
            elif frame.kind != "pong":
                self.on_frame(frame)
        except (FrameError, handshake.Stranger) as error:
            self.end(str(error))
        except handshake.Refused as error:
            self.send(handshake.refusal(str(error)))
            self._transport.close()

    def connection_lost(self, error):
        """Tells that the caller is gone."""
        self._timer.cancel()
        if self._known:
            self.on_lost(self._reason if error is None else str(error))

    def _greet(self, hello):
        self.facts = handshake.check_hello(self._token, self._challenge, hello)
        self._check(self)
        self.send(handshake.welcome(self._token, hello, {}))
        self._known = True
        self._reader.max_header, self._reader.max_body = MAX_HEADER, MAX_BODY
        self._timer.cancel()
        self._beat()
        self._arrived(self)

    def _beat(self):
        # Counted in pings, not read from the clock: while this loop stands still it sends none, and the
        # answers to earlier ones lie unread until it goes on.
        silence = self._unanswered * PING_SECONDS
        if silence >= SILENCE_SECONDS:
            self.end(f"it has been silent for {silence:.0f} s")
            return
        self._unanswered += 1
        self.send({"kind": "ping"})
        self._timer = self._loop.call_later(PING_SECONDS, self._beat)
