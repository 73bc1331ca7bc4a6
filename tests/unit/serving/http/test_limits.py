"""Clients that send too much outside of bodies, or nothing, over raw sockets."""

import asyncio
import contextlib
import json
import socket
import time

import pytest

from hvdext.serving.http import http_limits
from tests.unit.serving.http.http_server import serving
from tests.unit.serving.serving_fakes import FakeService

KEY = "a-key-of-some-length"
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
PREDICT = b"POST /v1/models/scale:predict HTTP/1.1\r\nHost: localhost\r\n"
ROW = b'{"instances": [[1, 2, 3]]}'
MOST = http_limits.MAX_HEAD_BYTES


class Slow(FakeService):
    """Answers after 1.5 s."""

    async def infer(self, *args):
        await asyncio.sleep(1.5)
        return await super().infer(*args)


@pytest.fixture(scope="module")
def port():
    with serving(FakeService()) as address:
        yield int(address.rpartition(":")[2])


@pytest.fixture
def impatient(monkeypatch):
    """The port of a server whose clients have 1 s for a message; it answers slowly and wants a key."""
    monkeypatch.setattr(http_limits, "MESSAGE_SECONDS", 1.0)
    with serving(Slow(), api_keys=[KEY]) as address:
        yield int(address.rpartition(":")[2])


@contextlib.contextmanager
def connected(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        yield connection


def answer(connection):
    """The status and the body of one answer; (None, None) at the end of the connection."""
    with connection.makefile("rb") as lines:
        first = lines.readline()
        if not first:
            return None, None
        headers = dict(line.lower().split(b": ") for line in iter(lines.readline, b"\r\n"))
        return int(first.split()[1]), json.loads(lines.read(int(headers[b"content-length"])))


def padded(size):
    """A request whose head has that many bytes."""
    start = LIVE[:-2] + b"x: "
    return start + b"a" * (size - len(start) - 4) + b"\r\n\r\n"


def flood(connection, part):
    """Sends it again and again; how many bytes the server takes before it has enough."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 64 * 2**20:
            connection.sendall(part)
            sent += len(part)
    return sent


@pytest.mark.parametrize("start", [b"GET /", LIVE[:-2] + b"x: ", LIVE[:-2] + b"x", LIVE + LIVE[:-2] + b"x: "])
def test_a_head_without_end(port, start):
    with connected(port) as connection:
        connection.sendall(start)
        assert flood(connection, b"a" * 2**16) < 32 * 2**20  # what the system's buffers hold


def test_many_headers_without_end(port):
    with connected(port) as connection:
        connection.sendall(LIVE[:-2])
        assert flood(connection, b"a: b\r\n" * 10_000) < 32 * 2**20


@pytest.mark.parametrize("start", [b"0\r\nx: ", b"0\r\nx", b"5; x="])
def test_a_chunked_body_with_much_that_is_no_body(port, start):
    with connected(port) as connection:
        connection.sendall(PREDICT + b"Transfer-Encoding: chunked\r\n\r\n" + start)
        assert flood(connection, b"a" * 2**16) < 32 * 2**20


def test_heads_up_to_the_limit_are_answered_others_told_why(port):
    with connected(port) as connection:
        for size in (MOST, len(LIVE) + 10, MOST - 1):
            connection.sendall(padded(size))
            assert answer(connection) == (200, {"live": True})
        connection.sendall(padded(MOST + 1))
        status, body = answer(connection)
        assert status == 431
        assert body == {"error": "The request line and the headers must not exceed 65536 bytes."}
        assert answer(connection) == (None, None)


def test_bodies_in_many_small_parts_and_heads_in_a_row_are_within_it(port):
    with connected(port) as connection:
        text = ROW + b" " * MOST
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in text) + b"0\r\n\r\n"
        connection.sendall(PREDICT + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert answer(connection) == (200, {"predictions": [[3, 6, 9]]})
        connection.sendall(LIVE * 20)
        with connection.makefile("rb") as lines:
            taken = b""
            while taken.count(b'{"live":true}') < 20:
                taken += lines.read1()


def test_who_sends_no_whole_message_is_left(impatient):
    with contextlib.ExitStack() as stack:
        connections = []

        def connect():
            connections.append(stack.enter_context(connected(impatient)))
            return connections[-1]

        for sent in (b"", b"\r\n", b"G", LIVE[:-2] + b"x: a\r\n"):
            connect().sendall(sent)
        for sent in (b"\r\n", b"G"):  # after a whole one
            connection = connect()
            connection.sendall(LIVE)
            assert answer(connection)[0] == 200
            connection.sendall(sent)
        for sent in (b" ", b" " * 10, b" " * 10 + b"\r\n"):  # a body that is not wanted
            connection = connect()
            connection.sendall(PREDICT + b"Content-Length: 10\r\n\r\n")
            assert answer(connection)[0] == 401
            connection.sendall(sent)
        for connection in connections:
            assert connection.recv(1) == b""


@pytest.mark.slow
def test_who_waits_for_an_answer_or_between_requests_is_not_left(impatient):
    with connected(impatient) as connection:
        head = b"X-API-Key: %b\r\nContent-Length: %d\r\n\r\n" % (KEY.encode(), len(ROW))
        connection.sendall(PREDICT + head + ROW)
        assert answer(connection) == (200, {"predictions": [[3, 6, 9]]})
        time.sleep(1.5)  # uvicorn's own limit is longer
        connection.sendall(LIVE)
        assert answer(connection)[0] == 200
