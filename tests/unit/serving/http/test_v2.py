"""The Open Inference Protocol, JSON: answers worked out by hand, and every bad input."""

import math

import numpy as np
import pytest
from starlette.testclient import TestClient

from hvdext.serving import service as s
from hvdext.serving.http.app import make_app
from tests.unit.serving.serving_fakes import FakeService, echo, inverse, raising

INFER = "/v2/models/scale/infer"


def tensor(data, shape, name="x", datatype="FP32", **more):
    return {"name": name, "shape": shape, "datatype": datatype, "data": data, **more}


def scaled(client, data=((1, 2, 3),), shape=(1, 3), path=INFER, **more):
    return client.post(path, json={"inputs": [tensor(data, shape)], **more})


def test_the_newest_version_answers_and_others_by_number(client):
    newest = scaled(client)
    assert newest.status_code == 200
    assert newest.headers["content-type"] == "application/json"
    assert newest.json() == {
        "model_name": "scale",
        "model_version": "2",
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [3.0, 6.0, 9.0]}],
    }
    first = scaled(client, path="/v2/models/scale/versions/1/infer").json()
    assert (first["model_version"], first["outputs"][0]["data"]) == ("1", [2.0, 4.0, 6.0])


def test_data_may_be_flat_and_the_id_comes_back(client):
    answer = scaled(client, [1, 2, 3, 4, 5, 6.5], [2, 3], id="seven").json()
    assert answer["id"] == "seven"
    assert answer["outputs"][0]["shape"] == [2, 3]
    assert answer["outputs"][0]["data"] == [3, 6, 9, 12, 15, 19.5]


MIXED = [
    tensor(["ä", "b"], [2, 1], "text", "BYTES"),
    tensor([[[1, 2], [3, 255]], [[0, 0], [0, 4]]], [2, 2, 2], "image", "UINT8"),
    tensor([2**62, -1], [2], "ids", "INT64"),
]


def test_several_inputs_in_any_order(client):
    answer = client.post("/v2/models/mixed/infer", json={"inputs": MIXED}).json()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs == {
        "ids": [2**62, -1],
        "total": [261 / 8, 0.5],
        "upper": ["ä", "B"],  # bytes know no letters beyond ASCII
    }


def test_only_the_outputs_asked_for_in_that_order(client):
    asked = {"inputs": MIXED, "outputs": [{"name": "upper"}, {"name": "ids"}]}
    answer = client.post("/v2/models/mixed/infer", json=asked).json()
    assert [output["name"] for output in answer["outputs"]] == ["upper", "ids"]


def test_the_timeout_is_in_microseconds(client, service):
    scaled(client, parameters={"timeout": 1_500_000})
    scaled(client, parameters={"timeout": 0})
    scaled(client)
    assert service.timeouts == [1.5, None, None]


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [True, False]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 65535]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT16", [-32768, 32767]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP16", [-65504, 0.5]),
        ("FP32", [-1.5, 0.1]),
        ("FP32", [-3.4028235e38, 3.4028235e38]),  # the largest as NumPy prints it: a little beyond itself
        ("FP64", [1e300, 0.1]),
        ("BYTES", ["", "ü\n\u0000"]),
    ],
)
def test_every_datatype_comes_back_as_it_was(datatype, values):
    client = TestClient(make_app(FakeService({("echo", 1): echo(datatype)})))
    answer = client.post(
        "/v2/models/echo/infer", json={"inputs": [tensor(values, [1, 2], datatype=datatype)]}
    )
    assert answer.json()["outputs"] == [{"name": "y", "datatype": datatype, "shape": [1, 2], "data": values}]


def test_numbers_that_are_not_finite_come_as_null():
    client = TestClient(make_app(FakeService({("inverse", 1): inverse()})))
    answer = client.post("/v2/models/inverse/infer", json={"inputs": [tensor([0, 4], [2])]})
    assert answer.json()["outputs"][0]["data"] == [None, 0.25]


def test_metadata(client):
    assert client.get("/v2/models/mixed").json() == {
        "name": "mixed",
        "versions": ["1"],
        "platform": "keras",
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1]},
            {"name": "image", "datatype": "UINT8", "shape": [-1, 2, 2]},
            {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "outputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1]},
            {"name": "total", "datatype": "FP64", "shape": [-1]},
            {"name": "upper", "datatype": "BYTES", "shape": [-1, 1]},
        ],
        "parameters": {"requests_together": True, "reason": ""},
    }
    assert client.get("/v2/models/scale/versions/1").json()["versions"] == ["1", "2"]
    server = client.get("/v2").json()
    assert server["name"] == "hvdext"
    assert server["extensions"] == ["binary_tensor_data", "model_repository"]


def test_health_follows_the_service(client, service):
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/scale/ready").json() == {"name": "scale", "ready": True}
    service.live = service.ready = False
    service.states["mixed", 1] = s.State.UNAVAILABLE, "rank 1 is lost"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/mixed/ready"):
        assert client.get(path).status_code == 503
    assert client.get("/v2/models/none/ready").status_code == 404


def test_a_model_that_was_never_loaded_says_when_to_come_again(client, service):
    service.states["mixed", 1] = s.State.LOADING, "reading the file"
    for answer in (client.post("/v2/models/mixed/infer", json={}), client.get("/v2/models/mixed")):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json() == {"error": "Model 'mixed' version 1 is LOADING: reading the file."}


def test_repository_index_load_and_unload():
    service = FakeService(repository={("scale", 3): echo("FP32"), ("scale", 1): echo("FP32")})
    client = TestClient(make_app(service))
    service.states["mixed", 1] = s.State.UNAVAILABLE, "broken"
    index = client.post("/v2/repository/index").json()
    assert [(e["name"], e["version"], e["state"], e["reason"]) for e in index] == [
        ("mixed", "1", "UNAVAILABLE", "broken"),
        ("scale", "1", "READY", ""),
        ("scale", "2", "READY", ""),
        ("scale", "3", "UNAVAILABLE", "not loaded"),
    ]
    ready = client.post("/v2/repository/index", json={"ready": True}).json()
    assert [entry["version"] for entry in ready] == ["1", "2"]

    assert client.post("/v2/repository/models/scale/load").status_code == 200
    assert service.find("scale").version == 3
    unload = {"parameters": {"version": 3, "unload_dependents": False}}
    assert client.post("/v2/repository/models/scale/unload", json=unload).json() == {}
    assert service.find("scale").version == 2
    assert client.post("/v2/repository/models/scale/unload", json={}).status_code == 200
    assert client.get("/v2/models/scale").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("index", {"ready": 1}, 400, "`ready` must be true or false. Received: 1"),
        ("index", [], 400, "The body must be an object"),
        ("models/none/load", {}, 404, "no model 'none'"),
        ("models/scale/load", {"parameters": {"config": "{}"}}, 400, "no parameters. Received: 'config'"),
        ("models/scale/load", {"parameters": 5}, 400, "`parameters` must be an object"),
        ("models/none/unload", {}, 404, "no model 'none'"),
        ("models/scale/unload", {"parameters": {"version": "1"}}, 400, "whole number from 1. Received: '1'"),
        ("models/scale/unload", {"parameters": {"unload_dependents": 1}}, 400, "must be true or false"),
        ("models/scale/unload", {"parameters": {"versio": 1}}, 400, "Received: 'versio'"),
    ],
)
def test_bad_repository_requests(client, path, body, status, said):
    answer = client.post(f"/v2/repository/{path}", json=body)
    assert answer.status_code == status
    assert said in answer.json()["error"]


GOOD = tensor([[1, 2, 3]], [1, 3])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ([], "The request must be an object. Received: []"),
        ({}, "`inputs` must be a list. Received: nothing"),
        ({"inputs": {}}, "`inputs` must be a list"),
        ({"inputs": []}, "takes the inputs 'x'. Missing: 'x'"),
        ({"inputs": [5]}, "Each of `inputs` must be an object. Received: 5"),
        ({"inputs": [{}]}, "The `name` of an input must be a string. Received: nothing"),
        ({"inputs": [{**GOOD, "name": "X1"}]}, "takes the inputs 'x'. Received another one: 'X1'"),
        ({"inputs": [GOOD, GOOD]}, "Input 'x' must be there once"),
        ({"inputs": [GOOD, {**GOOD, "name": "z"}]}, "Received another one: 'z'"),
        (
            {"inputs": [{**GOOD, "datatype": "FP64"}]},
            "`datatype` of input 'x' must be 'FP32'. Received: 'FP64'",
        ),
        ({"inputs": [{**GOOD, "datatype": None}]}, "must be 'FP32'. Received: None"),
        ({"inputs": [{**GOOD, "shape": 3}]}, "The `shape` of input 'x' must be a list. Received: 3"),
        ({"inputs": [{**GOOD, "shape": [1.0, 3]}]}, "must be whole numbers. Received: [1.0, 3]"),
        ({"inputs": [{**GOOD, "shape": [True, 3]}]}, "must be whole numbers"),
        (
            {"inputs": [{**GOOD, "shape": [1, 4]}]},
            "must be [any, 3], with lengths of 1 or more. Received: [1, 4]",
        ),
        ({"inputs": [{**GOOD, "shape": [3]}]}, "must be [any, 3], with lengths of 1 or more. Received: [3]"),
        ({"inputs": [{**GOOD, "shape": [0, 3], "data": []}]}, "lengths of 1 or more. Received: [0, 3]"),
        ({"inputs": [{**GOOD, "shape": [-1, 3]}]}, "lengths of 1 or more. Received: [-1, 3]"),
        ({"inputs": [{**GOOD, "shape": [2**62, 3]}]}, "lists nested as [1, 3]"),
        ({"inputs": [{**GOOD, "data": [1, 2]}]}, "must hold 3 values for the shape [1, 3]. Received: 2"),
        (
            {"inputs": [{**GOOD, "data": [[1], [2], [3]]}]},
            "nested like its shape, [1, 3]. Received: lists nested as [3, 1]",
        ),
        (
            {"inputs": [tensor([[1, 2, 3], [4, 5]], [2, 3])]},
            "ragged: lists at depth 1 must be of one length. Received: lengths 2 and 3",
        ),
        (
            {"inputs": [tensor([[1, 2, 3], 4], [2, 3])]},
            "is ragged: at depth 1 it holds lists and a whole number",
        ),
        ({"inputs": [{**GOOD, "data": 5}]}, "The data of input 'x' must be a list. Received: a whole number"),
        ({"inputs": [{**GOOD, "data": None}]}, "must be a list. Received: null"),
        (
            {"inputs": [{**GOOD, "data": ["1", 2, 3]}]},
            "numbers (JSON has no NaN and no Infinity). Received: a string, '1'",
        ),
        ({"inputs": [{**GOOD, "data": [1, True, 3]}]}, "Received: true or false, True"),
        ({"inputs": [{**GOOD, "data": [1, None, 3]}]}, "Received: null"),
        ({"inputs": [{**GOOD, "data": [1, {}, 3]}]}, "Received: an object"),
        (
            {"inputs": [{**GOOD, "data": [1, 1e39, 3]}]},
            "-3.4028234663852886e+38 to 3.4028234663852886e+38. Received: 1e+39",
        ),
        (
            {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32"}]},
            "`data` or the parameter `binary_data_size` for input 'x'",
        ),
        ({"inputs": [{**GOOD, "parameters": []}]}, "The `parameters` of input 'x' must be an object"),
        (
            {"inputs": [{**GOOD, "parameters": {"shared_memory_region": "a"}}]},
            "`shared_memory_region` of input 'x' is not supported",
        ),
        (
            {"inputs": [GOOD], "parameters": {"sequence_id": 4}},
            "`sequence_id` of the request is not supported",
        ),
        ({"inputs": [GOOD], "parameters": {"timeout": -1}}, "whole number of microseconds"),
        ({"inputs": [GOOD], "parameters": {"timeout": 1.5}}, "whole number of microseconds"),
        ({"inputs": [GOOD], "parameters": {"timeout": True}}, "whole number of microseconds"),
        (
            {"inputs": [GOOD], "parameters": {"binary_data_output": 1}},
            "`binary_data_output` must be true or false",
        ),
        ({"inputs": [GOOD], "id": 5}, "`id` must be a string. Received: 5"),
        ({"inputs": [GOOD], "outputs": {}}, "`outputs` must be a list"),
        (
            {"inputs": [GOOD], "outputs": [{"name": "yy"}]},
            "`outputs` must be among 'y'. Received: 'yy'. Did you mean 'y'?",
        ),
        (
            {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            "`binary_data` must be true or false",
        ),
        (
            {"inputs": [GOOD], "outputs": [{"name": "y", "parameters": {"classification": 2}}]},
            "`classification` of output 'y' is not supported",
        ),
    ],
)
def test_bad_requests_are_told_what_was_expected(client, service, request_, said):
    answer = client.post(INFER, json=request_)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert list(answer.json()) == ["error"]
    assert service.timeouts == []  # nothing reached the model


@pytest.mark.parametrize(
    ("datatype", "values", "said"),
    [
        ("UINT8", [0, 256], "range of UINT8, 0 to 255. Received: 256"),
        ("INT8", [-129, 0], "range of INT8, -128 to 127. Received: -129"),
        ("UINT64", [-1, 0], "range of UINT64"),
        ("INT64", [2**63, 0], "range of INT64"),
        ("UINT64", [2**64, 0], "(UINT64) must be whole numbers, without a decimal point"),
        (
            "INT32",
            [1.0, 0],
            "without a decimal point. Received: a number with a fraction, 1.0",
        ),
        ("FP16", [65520, 0], "range of FP16, -65504.0 to 65504.0. Received: 65520"),
        ("BOOL", [1, 0], "(BOOL) must be true or false. Received: a whole number, 1"),
        ("BYTES", [1, "a"], "(BYTES) must be strings. Received: a whole number, 1"),
        ("BYTES", [{"b64": "YQ=="}, "a"], "(BYTES) must be strings. Received: an object"),
    ],
)
def test_values_out_of_a_datatype(datatype, values, said):
    client = TestClient(make_app(FakeService({("echo", 1): echo(datatype)})))
    body = {"inputs": [tensor(values, [1, 2], datatype=datatype)]}
    answer = client.post("/v2/models/echo/infer", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_inputs_with_different_numbers_of_rows(client):
    inputs = [MIXED[0], MIXED[1], tensor([1], [1], "ids", "INT64")]
    answer = client.post("/v2/models/mixed/infer", json={"inputs": inputs})
    assert answer.status_code == 400
    assert "Received: 'text' with 2, 'image' with 2, 'ids' with 1." in answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    [
        "none/infer",
        "scale/versions/9/infer",
        "scale/versions/0/infer",
        "scale/versions/a/infer",
        "scale/versions/-1/infer",
        "scale/versions/" + "9" * 5000 + "/infer",
        "scale/versions/²/infer",
    ],
)
def test_unknown_models_and_versions(client, path):
    answer = scaled(client, path=f"/v2/models/{path}")
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]
    assert len(answer.text) < 200


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (s.QueueFull("256 requests wait"), 503, "1"),
        (s.NotReady("draining"), 503, "1"),
        (s.DeadlineExceeded("30 s have passed"), 504, None),
        (s.OwnDeadlineExceeded("0.1 s have passed"), 408, None),
        (s.ComputationFailed("rank 1 was lost"), 500, None),
    ],
)
def test_what_the_service_raises_is_passed_on(error, status, retry):
    client = TestClient(make_app(FakeService({("m", 1): raising(error)})))
    answer = client.post("/v2/models/m/infer", json={"inputs": [tensor([1], [1])]})
    assert (answer.status_code, answer.json()) == (status, {"error": str(error)})
    assert answer.headers.get("retry-after") == retry


def test_an_unexpected_error_shows_a_number_and_no_traceback(caplog):
    client = TestClient(make_app(FakeService({("m", 1): raising(RuntimeError("secret"))})))
    answer = client.post("/v2/models/m/infer", json={"inputs": [tensor([1], [1])]})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    number = answer.json()["error"].rstrip(".").split()[-1]
    assert number in caplog.text
    assert "secret" in caplog.text


def test_long_lists_are_right(client):
    x = np.arange(3000, dtype=np.float32).reshape(-1, 3) / 7
    answer = scaled(client, x.tolist(), x.shape).json()["outputs"][0]
    assert math.prod(answer["shape"]) == 3000
    np.testing.assert_array_equal(np.float32(answer["data"]), x.ravel() * 3)
