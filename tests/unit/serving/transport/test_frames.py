"""What two ends of a connection tell each other, also when one of them lies."""

import json
import random
import socket
import struct
import threading

import numpy as np
import pytest
from ml_dtypes import bfloat16

from hvdext.serving.transport import handshake
from hvdext.serving.transport.connection import Connection, accept, connect
from hvdext.serving.transport.frames import FrameError, FrameReader, encode

TENSORS = {
    "floats": np.arange(6, dtype=np.float32).reshape(2, 3),
    "big-endian": np.arange(3, dtype=">i4"),
    "every second": np.arange(10, dtype=np.int64)[::2],
    "transposed": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "scalar": np.array(7, np.uint8),
    "flags": np.array([True, False]),
    "nothing": np.zeros((0, 4), np.float16),
    "brain": np.array([1.5, -2], bfloat16),
    "texts": np.array([[b"a", b""], [b"\xff\x00", "ä".encode()]], object),
}


def read(data, step=1 << 20, **limits):
    """The frames in some bytes that arrive `step` at a time."""
    reader, found, start = FrameReader(**limits), [], 0
    while start < len(data):
        buffer = reader.buffer()
        count = min(len(buffer), step, len(data) - start)
        buffer[:count] = data[start : start + count]
        start += count
        frame = reader.received(count)
        if frame is not None:
            found.append(frame)
    assert reader.between_frames == (not len(data) or bool(found))
    return found


def raw(header, body=b"", length=None, size=None, magic=b"hvx1"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length, size = len(text) if length is None else length, len(body) if size is None else size
    return struct.pack("!4sIQ", magic, length, size) + text + body


def spec(dtype="float32", shape=(2,), size=8):
    return {"kind": "x", "tensors": [{"name": "t", "dtype": dtype, "shape": list(shape), "size": size}]}


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_tensors_arrive_as_they_left(step):
    data = b"".join(bytes(part) for part in encode({"kind": "x", "id": 3}, TENSORS))
    first, second = read(data * 2, step)
    for frame in (first, second):
        assert frame.header == {"kind": "x", "id": 3}
        assert list(frame.tensors) == list(TENSORS)
        for name, array in TENSORS.items():
            assert frame.tensors[name].shape == array.shape
            assert frame.tensors[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(frame.tensors[name], array)


@pytest.mark.parametrize(
    "data",
    [
        raw({"kind": "x", "tensors": []}, magic=b"GET "),
        raw(b"{", length=1),
        raw(b"\xff\xfe"),
        raw({"kind": "x"}),
        raw({"tensors": []}),
        raw({"kind": 3, "tensors": []}),
        raw([1, 2]),
        raw(b"[" * 50_000),
        raw({"kind": "x", "tensors": [{}]}),
        raw({"kind": "x", "tensors": 5}),
        raw({"kind": "x", "tensors": []}, b"left over"),
        raw(spec(), b"1234"),
        raw(spec(size=4), b"1234"),
        raw(spec(shape=(3,)), b"12345678"),
        raw(spec(shape=(1 << 40, 1 << 40)), b"12345678"),
        raw(spec(shape=(-2,)), b"12345678"),
        raw(spec(shape=(2.0,)), b"12345678"),
        raw(spec(size=-8), b"12345678"),
        raw(spec(size=True), b"1"),
        raw(spec(dtype="object"), b"12345678"),
        raw(spec(dtype="float128"), b"12345678"),
        raw(spec(dtype=["f4"]), b"12345678"),
        raw(spec(dtype="bytes"), b"\1\0\0\0a\5\0\0"),
        raw(spec(dtype="bytes"), b"\1\0\0\0\xff\xff\xff\x7f"),
        raw(spec(dtype="bytes", shape=(1,)), b"\1\0\0\0abcd"),
        raw(spec(dtype="bytes", shape=(1 << 50,)), b"12345678"),
    ],
)
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(FrameError):
        read(data)


def test_sizes_are_refused_before_memory_is_taken():
    with pytest.raises(FrameError, match=r"body of 100 bytes. Received: 2 and 1099511627776"):
        read(raw(b"{}", size=1 << 40), max_body=100)
    with pytest.raises(FrameError, match="header of 8388608"):
        read(raw(b"{}", length=(1 << 32) - 1))


def test_noise_is_a_frame_or_refused():
    whole = b"".join(bytes(part) for part in encode({"kind": "x", "id": 3}, TENSORS))
    chance = random.Random(0)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(16, len(data))] = chance.randrange(256)
        try:
            (frame,) = read(bytes(data))
        except FrameError:
            continue
        assert frame.kind is not None


def test_what_cannot_travel_is_refused():
    with pytest.raises(TypeError, match=r"tensor 'z' must hold numbers or text. Received: complex128"):
        encode({"kind": "x"}, {"z": np.zeros(2, complex)})


def over_sockets(token_here, token_there):
    listener = socket.create_server(("127.0.0.1", 0))
    found = []
    thread = threading.Thread(target=lambda: found.append(accept(listener, token_there)), daemon=True)
    thread.start()
    try:
        connection, _ = connect([listener.getsockname()], token_here, {"rank": 1}, 5)
    except ConnectionError as error:
        listener.close()
        return error
    thread.join(5)
    listener.close()
    return connection, *found[0]


def test_both_ends_must_know_the_token():
    here, there, facts = over_sockets("secret", "secret")
    assert facts == {"rank": 1}
    here.send({"kind": "question"}, {"x": np.arange(100_000.0)})
    there.send({"kind": "ping"})
    there.send({"kind": "answer"}, {"y": np.ones(3)})
    assert here.receive().kind == "answer"  # the ping is answered on the way
    assert there.receive().tensors["x"].sum() == sum(range(100_000))
    assert there.receive().kind == "pong"
    here.close()
    assert there.receive() is None
    assert "another token" in str(over_sockets("secret", "another"))


def test_a_listener_that_does_not_know_the_token_gets_nothing():
    listener = socket.create_server(("127.0.0.1", 0))

    def lie():
        other = Connection(listener.accept()[0])
        other.send(handshake.challenge())
        other.receive()
        other.send({"kind": "welcome", "proof": "0" * 64, "facts": {}})
        other.receive()

    threading.Thread(target=lie, daemon=True).start()
    with pytest.raises(ConnectionError, match="does not know the token"):
        connect([listener.getsockname()], "secret", {}, 5)
    listener.close()


def test_an_end_within_a_frame_is_an_error():
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    receiver = Connection(listener.accept()[0])
    sender.sendall(raw({"kind": "x", "tensors": []})[:-3])
    sender.close()
    with pytest.raises(FrameError, match="ended within a frame"):
        receiver.receive()
