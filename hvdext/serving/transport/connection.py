"""A connection of the worker's and the supervisor's: blocking, with frames in both directions."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdext.serving.transport import handshake
from hvdext.serving.transport.frames import Frame, FrameError, FrameReader, encode

_TOGETHER = 1 << 16  # bytes; smaller frames leave in one packet
_SECONDS = 10.0  # for a handshake


class Connection:
    """Sends and receives frames over a socket. Several threads may send, one may receive."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._reader = FrameReader()
        self._lock = threading.Lock()

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> None:
        """Sends one frame.

        Raises:
            OSError: if the connection is lost.
        """
        buffers = encode(header, tensors)
        if sum(map(len, buffers)) < _TOGETHER:
            buffers = [b"".join(buffers)]
        with self._lock:
            for buffer in buffers:
                self._socket.sendall(buffer)

    def receive(self) -> Frame | None:
        """Waits for the next frame; None once the other side has closed. Pings are answered on the way.

        Raises:
            FrameError: if something else comes.
            OSError: if the connection is lost.
        """
        while True:
            count = self._socket.recv_into(self._reader.buffer())
            if not count:
                if not self._reader.between_frames:
                    raise FrameError("the connection ended within a frame.")
                return None
            frame = self._reader.received(count)
            if frame is not None and frame.kind == "ping":
                self.send({"kind": "pong"})
            elif frame is not None:
                return frame

    def wait_at_most(self, seconds: float | None) -> None:
        """Sets how long sending and receiving may take; None: for ever."""
        self._socket.settimeout(seconds)

    def close(self) -> None:
        """Wakes whoever waits at the connection, and ends it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(
    addresses: Sequence[tuple[str, int]], token: str, facts: Mapping[str, Any], seconds: float = _SECONDS
) -> tuple[Connection, dict[str, Any]]:
    """Connects to the first address that answers and knows the token; both sides prove that they do.

    Args:
        addresses: hosts and ports of one and the same listener.
        token: the job's secret.
        facts: who is calling.
        seconds: for each address.

    Returns:
        The connection, and what the listener says about itself.

    Raises:
        ConnectionError: if none does; the message names them.
        handshake.Refused: if one does not want this caller.
    """
    problems = []
    for host, port in addresses:
        try:
            connection = Connection(socket.create_connection((host, port), seconds))
        except OSError as error:
            problems.append(f"{host}:{port}: {error}")
            continue
        try:
            connection.wait_at_most(seconds)
            challenge = connection.receive()
            hello = handshake.hello(token, challenge, facts)
            connection.send(hello)
            facts_there = handshake.check_welcome(token, hello, connection.receive())
            connection.wait_at_most(None)
            return connection, facts_there
        except handshake.Refused:
            connection.close()
            raise
        except (OSError, FrameError, handshake.Stranger) as error:
            connection.close()
            problems.append(f"{host}:{port}: {error}")
    raise ConnectionError("; ".join(problems) or "no address is known")


def accept(listener: socket.socket, token: str) -> tuple[Connection, Mapping[str, Any]]:
    """Waits for a caller that knows the token; strangers are turned away.

    Returns:
        The connection, and who is calling.

    Raises:
        OSError: if the listener is closed.
    """
    while True:
        connection = Connection(listener.accept()[0])
        try:
            connection.wait_at_most(_SECONDS)
            challenge = handshake.challenge()
            connection.send(challenge)
            hello = connection.receive()
            facts = handshake.check_hello(token, challenge, hello)
            connection.send(handshake.welcome(token, hello, {}))
            connection.wait_at_most(None)
            return connection, facts
        except (OSError, FrameError, handshake.Stranger):
            connection.close()
