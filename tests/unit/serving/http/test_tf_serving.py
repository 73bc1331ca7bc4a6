"""TensorFlow Serving's REST: answers worked out by hand, and every bad input."""

import pytest
from starlette.testclient import TestClient

from hvdext.serving import service as s
from hvdext.serving.http.app import make_app
from tests.unit.serving.serving_fakes import FakeService, echo, inverse, mixed

PREDICT = "/v1/models/scale:predict"
ROW = {"ids": 7, "image": [[1, 2], [3, 2]], "text": ["a"]}
COLUMNS = {"ids": [7, 8], "image": [[[1, 2], [3, 2]], [[0, 0], [0, 4]]], "text": [["a"], [{"b64": "Yg=="}]]}


def predict(client, request, path=PREDICT):
    answer = client.post(path, json=request)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_rows_of_one_input(client):
    assert predict(client, {"instances": [[1, 2, 3], [0, 0, 1.5]]}) == {
        "predictions": [[3, 6, 9], [0, 0, 4.5]]
    }
    assert predict(client, {"instances": [{"x": [1, 2, 3]}]}) == {"predictions": [[3, 6, 9]]}
    first = "/v1/models/scale/versions/1:predict"
    assert predict(client, {"signature_name": "serving_default", "instances": [[1, 2, 3]]}, first) == {
        "predictions": [[2, 4, 6]]
    }


def test_columns_of_one_input(client):
    assert predict(client, {"inputs": [[1, 2, 3]]}) == {"outputs": [[3, 6, 9]]}
    assert predict(client, {"inputs": {"x": [[1, 2, 3]]}}) == {"outputs": [[3, 6, 9]]}


def test_rows_of_several_inputs(client):
    request = {"instances": [ROW, {"ids": 8, "image": [[0, 0], [0, 4]], "text": [{"b64": "Yg=="}]}]}
    assert predict(client, request, "/v1/models/mixed:predict") == {
        "predictions": [{"ids": 7, "total": 1, "upper": ["A"]}, {"ids": 8, "total": 0.5, "upper": ["B"]}]
    }


def test_columns_of_several_inputs(client):
    assert predict(client, {"inputs": COLUMNS}, "/v1/models/mixed:predict") == {
        "outputs": {"ids": [7, 8], "total": [1, 0.5], "upper": [["A"], ["B"]]}
    }


def test_bytes_alone_and_bytes_that_are_no_text():
    flat = (s.TensorSpec("x", "BYTES", (None,)),)
    for name, expected in (("y", ["a", {"b64": "/w=="}]), ("y_bytes", [{"b64": "YQ=="}, {"b64": "/w=="}])):
        outputs = (s.TensorSpec(name, "BYTES", (None,)),)
        model = (s.Signature(flat, outputs), lambda inputs, name=name: {name: inputs["x"]})
        client = TestClient(make_app(FakeService({("echo", 1): model})))
        request = {"instances": ["a", {"b64": "/w=="}]}
        assert predict(client, request, "/v1/models/echo:predict") == {"predictions": expected}
        assert predict(client, {"inputs": ["a", {"b64": "/w=="}]}, "/v1/models/echo:predict") == {
            "outputs": expected
        }


@pytest.mark.parametrize("datatype", ["FP16", "FP64", "INT8", "UINT64", "BOOL"])
def test_scalars_in_rows_with_two_outputs(datatype):
    one, spec = (True if datatype == "BOOL" else 1), s.TensorSpec("x", datatype, (None,))
    both = s.Signature((spec,), (s.TensorSpec("a", datatype, (None,)), s.TensorSpec("b", datatype, (None,))))
    model = (both, lambda inputs: {"a": inputs["x"], "b": inputs["x"]})
    client = TestClient(make_app(FakeService({("twice", 1): model})))
    answer = predict(client, {"instances": [one, one]}, "/v1/models/twice:predict")
    assert answer == {"predictions": [{"a": one, "b": one}] * 2}


def test_numbers_that_are_not_finite_come_as_null():
    client = TestClient(make_app(FakeService({("inverse", 1): inverse()})))
    assert predict(client, {"instances": [0, 4]}, "/v1/models/inverse:predict") == {
        "predictions": [None, 0.25]
    }


def test_status(client, service):
    service.states["scale", 1] = s.State.UNAVAILABLE, "rank 1 is lost"
    ok = {"error_code": "OK", "error_message": ""}
    lost = {"error_code": "UNAVAILABLE", "error_message": "rank 1 is lost"}
    newest = {"version": "2", "state": "AVAILABLE", "status": ok}
    first = {"version": "1", "state": "END", "status": lost}
    assert client.get("/v1/models/scale").json() == {
        "name": "scale",
        "ready": True,
        "model_version_status": [newest, first],
    }
    assert client.get("/v1/models/scale/versions/1").json() == {
        "name": "scale",
        "ready": False,
        "model_version_status": [first],
    }


def test_kserves_list_and_health(client, service):
    assert client.get("/v1/models").json() == {"models": ["mixed", "scale"]}
    service.states["mixed", 1] = s.State.LOADING, "it is being loaded"
    answers = {name: client.get(f"/v1/models/{name}").json() for name in ("mixed", "scale")}
    assert {name: (found["name"], found["ready"]) for name, found in answers.items()} == {
        "mixed": ("mixed", False),
        "scale": ("scale", True),
    }
    alive = client.get("/", headers={"Accept": "application/json"})
    assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
    service.live = False
    assert client.get("/", headers={"Accept": "application/json"}).status_code == 503


def test_metadata(client):
    found = client.get("/v1/models/mixed/versions/1/metadata").json()
    assert found["model_spec"] == {"name": "mixed", "signature_name": "", "version": "1"}
    default = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert default["method_name"] == "tensorflow/serving/predict"
    assert default["inputs"]["image"] == {
        "dtype": "DT_UINT8",
        "tensor_shape": {
            "dim": [{"size": "-1", "name": ""}, {"size": "2", "name": ""}, {"size": "2", "name": ""}],
            "unknown_rank": False,
        },
        "name": "image",
    }
    assert default["outputs"]["total"]["dtype"] == "DT_DOUBLE"
    assert client.get("/v1/models/mixed/metadata").json() == found


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ([], "The request must be an object"),
        ({}, '"instances" (rows) or "inputs" (columns). Received: neither'),
        ({"instances": [[1, 2, 3]], "inputs": [[1, 2, 3]]}, "Received: both"),
        (
            {"instances": [[1, 2, 3]], "signature_name": "train"},
            "`signature_name` must be 'serving_default'. Received: 'train'",
        ),
        ({"instances": []}, "one row or more"),
        ({"instances": {}}, '"instances" must be a list'),
        ({"instances": 5}, '"instances" must be a list. Received: 5'),
        (
            {"instances": [[1, 2]]},
            "shape of input 'x' must be [any, 3], with lengths of 1 or more. Received: [1, 2]",
        ),
        ({"instances": [1]}, "shape of input 'x' must be [any, 3]"),
        ({"instances": [[1, 2, 3], [1, 2]]}, "is ragged"),
        ({"instances": [[1, 2, 3], 4]}, "is ragged"),
        ({"instances": [[1, 2, "3"]]}, "must be numbers"),
        ({"instances": [[1, 2, {"b64": "YQ=="}]]}, "must be numbers"),
        ({"instances": [{"z": [1, 2, 3]}]}, "takes the inputs 'x'. Received another one: 'z'"),
        ({"instances": [{}]}, "Missing: 'x'"),
        ({"instances": [{"x": [1, 2, 3]}, [1, 2, 3]]}, "must be an object with 'x'"),
        ({"instances": [{"x": [1, 2, 3]}, {"b64": "YQ=="}]}, "must be an object with 'x'"),
        ({"inputs": 5}, "must be a list"),
        ({"inputs": {"z": []}}, "Received another one: 'z'"),
        ({"inputs": {}}, "Missing: 'x'"),
        ({"inputs": None}, "must be a list. Received: null"),
    ],
)
def test_bad_requests_are_told_what_was_expected(client, service, request_, said):
    answer = client.post(PREDICT, json=request_)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert list(answer.json()) == ["error"]
    assert service.timeouts == []


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"instances": [[1]]}, "must be an object with 'ids', 'image', 'text'"),
        ({"instances": [ROW, {"ids": 1}]}, "Missing: 'image', 'text'"),
        ({"inputs": [1, 2]}, "must be an object with 'ids', 'image', 'text'"),
        ({"inputs": {**COLUMNS, "ids": [1]}}, "same number of rows (the first axis). Received: 'ids' with 1"),
        ({"inputs": {**COLUMNS, "text": [["a"], [5]]}}, "must be strings. Received: a whole number, 5"),
        ({"inputs": {**COLUMNS, "text": [["a"], [{"b64": "?"}]]}}, "in base 64"),
        ({"inputs": {**COLUMNS, "text": [["a"], [{"b64": 5}]]}}, "in base 64"),
        ({"inputs": {**COLUMNS, "text": [["a"], [{"b65": ""}]]}}, "an object with 'b65'"),
    ],
)
def test_bad_requests_for_several_inputs(request_, said):
    client = TestClient(make_app(FakeService({("mixed", 1): mixed()})))
    answer = client.post("/v1/models/mixed:predict", json=request_)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "none:predict", 404),
        ("POST", "scale/versions/9:predict", 404),
        ("POST", "scale/versions/x:predict", 404),
        ("POST", "scale:classify", 404),
        ("GET", "none", 404),
        ("GET", "scale/versions/9/metadata", 404),
        ("GET", "scale:predict", 405),
        ("POST", "scale", 405),
    ],
)
def test_unknown_models_and_methods(client, method, path, status):
    answer = client.request(method, f"/v1/models/{path}")
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]


def test_every_datatype_is_known_in_the_metadata():
    for datatype in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"):
        client = TestClient(make_app(FakeService({("echo", 1): echo(datatype)})))
        found = client.get("/v1/models/echo/metadata").json()["metadata"]["signature_def"]["signature_def"]
        assert found["serving_default"]["inputs"]["x"]["dtype"] == f"DT_{datatype}"
