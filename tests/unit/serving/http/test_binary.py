"""The binary tensor extension: bytes worked out by hand, and sizes that lie."""

import json
import struct

import numpy as np
import pytest
from starlette.testclient import TestClient

from hvdext.serving.http.app import make_app
from tests.unit.serving.serving_fakes import FakeService, echo

X = np.array([[1, 2, 3]], "<f4")


def entry(size, shape=(1, 3), name="x", datatype="FP32"):
    return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}


def post(client, request, tail=b"", path="scale", length=None):
    head = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(head) if length is None else length)}
    return client.post(f"/v2/models/{path}/infer", content=head + tail, headers=headers)


def parts(answer):
    """The JSON and the bytes of an answer."""
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    return json.loads(answer.content[:length]), answer.content[length:]


def test_binary_input_and_json_output(client):
    answer = post(client, {"inputs": [entry(12)]}, X.tobytes())
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["outputs"][0]["data"] == [3, 6, 9]


def test_binary_output_of_json_input(client):
    request = {
        "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}],
        "parameters": {"binary_data_output": True},
        "id": "a",
    }
    head, tail = parts(client.post("/v2/models/scale/infer", json=request))
    assert head == {
        "model_name": "scale",
        "model_version": "2",
        "id": "a",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}
        ],
    }
    assert tail == struct.pack("<3f", 3, 6, 9)


def test_some_inputs_and_outputs_in_binary(client):
    ids = {"name": "ids", "shape": [2], "datatype": "INT64", "data": [5, 6]}
    text, image = b"\x01\x00\x00\x00a\x00\x00\x00\x00", bytes([1, 2, 3, 4, 8, 0, 0, 0])
    request = {
        "inputs": [entry(9, [2, 1], "text", "BYTES"), ids, entry(8, [2, 2, 2], "image", "UINT8")],
        "outputs": [
            {"name": "upper", "parameters": {"binary_data": True}},
            {"name": "ids", "parameters": {"binary_data": False}},
            {"name": "total", "parameters": {"binary_data": True}},
        ],
    }
    head, tail = parts(post(client, request, text + image, "mixed"))
    assert [output.get("parameters", {}).get("binary_data_size") for output in head["outputs"]] == [
        9,
        None,
        16,
    ]
    assert head["outputs"][1]["data"] == [5, 6]
    assert tail == b"\x01\x00\x00\x00A\x00\x00\x00\x00" + struct.pack("<2d", 1.25, 1.0)


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("BOOL", b"\x00\x01"),
        ("UINT8", b"\x00\xff"),
        ("UINT16", struct.pack("<2H", 0, 65535)),
        ("UINT32", struct.pack("<2I", 0, 2**32 - 1)),
        ("UINT64", struct.pack("<2Q", 0, 2**64 - 1)),
        ("INT8", struct.pack("<2b", -128, 127)),
        ("INT16", struct.pack("<2h", -5, 5)),
        ("INT32", struct.pack("<2i", -5, 5)),
        ("INT64", struct.pack("<2q", -(2**63), 5)),
        ("FP16", struct.pack("<2e", 1.5, float("inf"))),
        ("FP32", struct.pack("<2f", 1.5, float("nan"))),
        ("FP64", struct.pack("<2d", 1.5, 1e300)),
        ("BYTES", b"\x03\x00\x00\x00\xff\xfe\x00\x01\x00\x00\x00a"),
    ],
)
def test_every_datatype_comes_back_byte_for_byte(datatype, data):
    client = TestClient(make_app(FakeService({("echo", 1): echo(datatype)})))
    request = {
        "inputs": [entry(len(data), [1, 2], datatype=datatype)],
        "parameters": {"binary_data_output": True},
    }
    head, tail = parts(post(client, request, data, "echo"))
    assert tail == data
    assert head["outputs"][0]["parameters"]["binary_data_size"] == len(data)


def test_bytes_that_are_no_text_are_to_be_asked_for_in_binary():
    client = TestClient(make_app(FakeService({("echo", 1): echo("BYTES")})))
    answer = post(client, {"inputs": [entry(5, [1, 1], datatype="BYTES")]}, b"\x01\x00\x00\x00\xff", "echo")
    assert answer.status_code == 400
    assert "no UTF-8" in answer.json()["error"]
    assert "`binary_data`: true" in answer.json()["error"]


def test_a_body_without_json_is_the_only_input(client):
    headers = {"Inference-Header-Content-Length": "0"}
    rows = np.array([[1, 2, 3], [4, 5, 6]], "<f4").tobytes()
    head, tail = parts(client.post("/v2/models/scale/infer", content=rows, headers=headers))
    assert head["outputs"][0]["shape"] == [2, 3]
    assert tail == struct.pack("<6f", 3, 6, 9, 12, 15, 18)
    for path, data, said in (
        ("scale", rows[:-1], "rows of input 'x', 12 bytes each"),
        ("scale", b"", "Received: 0 bytes"),
        ("mixed", rows, "models with one input. Model 'mixed' has 3"),
    ):
        answer = client.post(f"/v2/models/{path}/infer", content=data, headers=headers)
        assert (answer.status_code, said in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("size", "tail", "length", "said"),
    [
        (12, b"1" * 11, None, "`binary_data_size` of input 'x' must be 0 to 11"),
        (11, b"1" * 11, None, "must be 12 bytes long: FP32 of shape [1, 3]. Received: 11"),
        (16, b"1" * 16, None, "must be 12 bytes long"),
        (12, b"1" * 13, None, "must add up to the 13 bytes behind the JSON. Received: 12"),
        (-1, b"1" * 12, None, "must be 0 to 12"),
        (12.0, b"1" * 12, None, "must be 0 to 12"),
        (True, b"1" * 12, None, "must be 0 to 12"),
        ("12", b"1" * 12, None, "must be 0 to 12"),
        (10**30, b"1" * 12, None, "must be 0 to 12"),
        (12, b"1" * 12, 100_000, "the bytes of JSON that the body begins with"),
        (12, b"1" * 12, -1, "the bytes of JSON that the body begins with"),
        (12, b"1" * 12, "x", "Received: 'x'"),
        (12, b"1" * 12, 5, "The body must be JSON"),
    ],
)
def test_sizes_that_lie(client, service, size, tail, length, said):
    answer = post(client, {"inputs": [entry(size)]}, tail, length=length)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert service.timeouts == []


def test_data_and_a_size_contradict_each_other(client):
    answer = post(client, {"inputs": [{**entry(12), "data": [1, 2, 3]}]}, X.tobytes())
    assert "`data` or `binary_data_size` for input 'x'. Received: both" in answer.json()["error"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x05\x00\x00\x00a", "ends early: element 0 must have 5 bytes. Received: 1"),
        (b"\xff\xff\xff\xffa", "element 0 must have 4294967295 bytes"),
        (b"\x01\x00", "must be 2 elements"),
        (b"\x01\x00\x00\x00a", "Received: 1, then 0 bytes"),
        (b"\x01\x00\x00\x00a" * 3, "Received: 2, then 5 bytes"),
    ],
)
def test_bytes_whose_lengths_lie(data, said):
    client = TestClient(make_app(FakeService({("echo", 1): echo("BYTES")})))
    answer = post(client, {"inputs": [entry(len(data), [1, 2], datatype="BYTES")]}, data, "echo")
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_truths_other_than_0_and_1():
    client = TestClient(make_app(FakeService({("echo", 1): echo("BOOL")})))
    answer = post(client, {"inputs": [entry(2, [1, 2], datatype="BOOL")]}, b"\x01\x02", "echo")
    assert (answer.status_code, "bytes of 0 or 1" in answer.text) == (400, True)


def test_a_shape_that_lies_takes_no_memory():
    client = TestClient(make_app(FakeService({("echo", 1): echo("BYTES")})))
    answer = post(client, {"inputs": [entry(4, [2**40, 2**20], datatype="BYTES")]}, b"\x00" * 4, "echo")
    assert answer.status_code == 400
