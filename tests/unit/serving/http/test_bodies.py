"""Bodies that are no JSON, too large, too slow, compressed, of the wrong kind; clients that leave."""

import asyncio
import gzip
import json
import zlib

import pytest
from starlette.testclient import TestClient

from hvdext.serving.http.app import make_app
from tests.unit.serving.http.asgi_calls import call
from tests.unit.serving.serving_fakes import FakeService, scale

INFER = "/v2/models/scale/infer"
GOOD = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}
TEXT = json.dumps(GOOD).encode()


def refused(client, status, said, content=TEXT, headers=None, path=INFER):
    answer = client.post(path, content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert said in answer.json()["error"]
    return answer


@pytest.mark.parametrize("path", [INFER, "/v1/models/scale:predict", "/v2/repository/index"])
@pytest.mark.parametrize(
    "content",
    [
        TEXT[:-1],
        b'{"instances": [[1, 2, NaN]]}',
        b'{"instances": [[1, 2, Infinity]]}',
        b'{"instances": [[1, 2, -Infinity]]}',
        b'{"instances": [[1, 2, 1e999]]}',
        b'{"instances": ["\xff\xfe"]}',
        b'{"instances": ["\\ud800"]}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b"[" * 2000 + b"]" * 2000,
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b"\x00",
        b"{} {}",
        b"'a'",
    ],
    ids=lambda content: repr(content[:28]),
)
def test_what_is_no_json(client, path, content):
    refused(client, 400, "The body must be JSON in UTF-8.", content, path=path)


@pytest.mark.parametrize("path", [INFER, "/v1/models/scale:predict"])
def test_no_body_at_all(client, path):
    refused(client, 400, "The body must be JSON in UTF-8.", b"", path=path)


def test_deep_lists_within_what_json_allows(client):
    deep = b"[" * 1000 + b"1" + b"]" * 1000
    refused(client, 400, "", b'{"instances": ' + deep + b"}", path="/v1/models/scale:predict")
    refused(client, 400, "`id` must be a string", TEXT[:-1] + b', "id": ' + deep + b"}")


def test_a_body_over_the_limit_is_not_read():
    service = FakeService()
    client = TestClient(make_app(service, max_request_bytes=1000))
    answer = refused(client, 413, "must not exceed 1000 bytes", b" " * 1001)
    assert answer.headers["connection"] == "close"
    assert client.post(INFER, content=TEXT + b" " * (1000 - len(TEXT))).status_code == 200

    def parts():
        yield from [b" " * 600] * 2

    refused(client, 413, "must not exceed 1000 bytes", parts())  # no Content-Length
    refused(client, 413, "must not exceed 1000 bytes", headers={"Content-Length": "9" * 30})


@pytest.mark.parametrize("path", ["index", "models/scale/load", "models/scale/unload"])
def test_settings_are_small(path):
    client = TestClient(make_app(FakeService()))
    refused(client, 413, "must not exceed 262144 bytes", b" " * 2**18 + b"{}", path=f"/v2/repository/{path}")


def test_an_announced_body_over_the_limit_is_not_asked_for():
    app = make_app(FakeService(), max_request_bytes=1000)
    headers = [(b"content-length", b"100000000000"), (b"expect", b"100-continue")]

    async def never():
        raise AssertionError("the body was asked for")

    status, _ = asyncio.run(call(app, INFER, never, headers))
    assert status == 413


def test_only_so_much_is_dropped_for_a_client_that_goes_on_sending():
    app = make_app(FakeService(), max_request_bytes=1000)
    asked = 0

    async def endless():
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": b" " * 500, "more_body": True}

    status, _ = asyncio.run(call(app, INFER, endless))
    assert status == 413
    assert asked <= 6  # 1000 bytes read, 1000 more dropped


def test_a_body_that_does_not_arrive():
    app = make_app(FakeService(), receive_seconds=0.05)
    began = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def slow():
        return began.pop() if began else await asyncio.Event().wait()

    status, body = asyncio.run(call(app, INFER, slow))
    assert (status, json.loads(body)) == (408, {"error": "The body must arrive within 0.05 s."})


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("GZIP", gzip.compress)]
)
def test_compressed_bodies(client, encoding, pack):
    answer = client.post(INFER, content=pack(TEXT), headers={"Content-Encoding": encoding})
    assert answer.json()["outputs"][0]["data"] == [3, 6, 9]


def zipped(content):
    """Without the time: the tests' names, which hold it, must be the same in all of pytest's processes."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "encoding", "status", "said"),
    [
        (zipped(b" " * 10_000_000), "gzip", 413, "must not exceed 100000 bytes after decompression"),
        (zlib.compress(b" " * 10_000_000), "deflate", 413, "must not exceed 100000 bytes"),
        (zipped(TEXT)[:-9], "gzip", 400, "ends early"),
        (zipped(TEXT) + b"more", "gzip", 400, "more bytes after its end"),
        (TEXT, "gzip", 400, "cannot be decompressed"),
        (b"", "gzip", 400, "ends early"),
        (TEXT, "br", 415, "gzip, deflate or identity. Received: 'br'"),
        (zipped(zipped(TEXT)), "gzip, gzip", 415, "Received: 'gzip, gzip'"),
    ],
)
def test_bad_compression(client, content, encoding, status, said):
    refused(client, status, said, content, {"Content-Encoding": encoding})


def test_what_follows_a_compressed_body_is_not_gathered():
    app = make_app(FakeService())
    asked = 0

    async def endless():
        nonlocal asked
        asked += 1
        return {"type": "http.request", "body": zipped(TEXT) if asked == 1 else b" ", "more_body": asked < 50}

    status, body = asyncio.run(call(app, INFER, endless, [(b"content-encoding", b"gzip")]))
    assert (status, asked) == (400, 2)
    assert "more bytes after its end" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "Application/JSON; charset=UTF-8",
        "application/octet-stream",
        "application/x+json",
        None,
        "application/x-www-form-urlencoded",  # what curl -d says of its own accord
    ],
)
def test_media_types_that_are_taken(client, media_type):
    headers = {"Content-Type": media_type} if media_type else {}
    assert client.post(INFER, content=TEXT, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "application/xml",
        "multipart/form-data; boundary=a",
        "application/json; charset=latin-1",
        "json;",
    ],
)
def test_media_types_that_are_not(client, media_type):
    refused(client, 415, "application/json or application/octet-stream", headers={"Content-Type": media_type})


def test_a_client_that_leaves_is_not_computed_for():
    service = FakeService()

    async def leave_while_waiting():
        service.gate = asyncio.Event()
        messages = [{"type": "http.request", "body": TEXT, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            while not service.waiting:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        return await asyncio.wait_for(call(make_app(service), INFER, receive), 5)

    assert asyncio.run(leave_while_waiting()) == (None, b"")
    assert service.cancelled == 1


def test_a_client_that_leaves_in_its_body_is_no_error(caplog):
    app = make_app(FakeService())

    async def gone():
        return {"type": "http.disconnect"}

    assert asyncio.run(call(app, INFER, gone)) == (None, b"")
    assert not caplog.records


def test_bodies_of_all_requests_together_are_limited():
    """Two bodies of 600 bytes fit into 1,300, a third does not; when they are answered it does."""
    service = FakeService({("scale", 1): scale(2)})
    app = make_app(service, max_request_bytes=1000, max_held_bytes=1300)
    body = TEXT + b" " * (600 - len(TEXT))

    def receiver():
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        return receive

    async def three():
        service.gate = asyncio.Event()
        held = [asyncio.create_task(call(app, INFER, receiver())) for _ in range(2)]
        while service.waiting < 2:
            await asyncio.sleep(0)
        refused = await call(app, INFER, receiver())
        service.gate.set()
        return refused, [await task for task in held], await call(app, INFER, receiver())

    (status, text), held, later = asyncio.run(asyncio.wait_for(three(), 5))
    assert status == 503
    assert "hold 1300 bytes" in json.loads(text)["error"]
    assert [answer[0] for answer in (*held, later)] == [200] * 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_request_bytes": 0}, "`max_request_bytes` must be above 0. Received: 0"),
        ({"receive_seconds": -1}, "`receive_seconds` must be above 0"),
        ({"max_request_bytes": 10, "max_held_bytes": 9}, "at least `max_request_bytes`, 10. Received: 9"),
    ],
)
def test_limits_that_make_no_sense(arguments, said):
    with pytest.raises(ValueError, match=said):
        make_app(FakeService(), **arguments)
