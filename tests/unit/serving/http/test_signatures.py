"""Other signatures than the default, inputs that may be missing, text in base 64."""

import pytest
from starlette.testclient import TestClient

from hvdext.serving import service as s
from hvdext.serving.http.app import make_app
from tests.unit.serving.serving_fakes import FakeService, echo, scale, signature

X = s.TensorSpec("x", "FP32", (None, 2))
MORE = s.TensorSpec("more", "FP32", (None, 2), optional=True)


def optional():
    described = s.Signature((MORE, X), (s.TensorSpec("y", "FP32", (None, 2)),))
    return described, lambda inputs: {"y": inputs["x"] + 10 * inputs.get("more", 0)}


def length():
    described = signature({"text": ("BYTES", (None,))}, {"length": ("INT64", (None,))})
    return described, lambda inputs: {"length": [len(text) for text in inputs["text"]]}


@pytest.fixture
def client():
    models = {("scale", 1): scale(2), ("plus", 1): optional(), ("echo", 1): echo("BYTES")}
    others = {("scale", "triple"): scale(3), ("scale", "negative"): scale(-1)}
    return TestClient(make_app(FakeService(models, others=others)))


def predict(client, model, request):
    return client.post(f"/v1/models/{model}:predict", json=request)


def test_signatures_are_asked_for_by_name(client):
    rows = {"instances": [[1, 2, 3]]}
    for name, expected in (("triple", [3, 6, 9]), ("negative", [-1, -2, -3]), ("serving_default", [2, 4, 6])):
        answer = predict(client, "scale", {"signature_name": name, **rows})
        assert answer.json() == {"predictions": [expected]}
    columns = {"signature_name": "triple", "inputs": {"x": [[1, 2, 3]]}}
    assert predict(client, "scale", columns).json() == {"outputs": [[3, 6, 9]]}
    refused = predict(client, "scale", {"signature_name": "third", **rows})
    assert refused.status_code == 400
    assert refused.json()["error"] == (
        "`signature_name` must be 'serving_default' or 'triple' or 'negative'. Received: 'third'."
    )
    assert predict(client, "scale", {"signature_name": 3, **rows}).status_code == 400


def test_the_metadata_has_all_signatures(client):
    found = client.get("/v1/models/scale/metadata").json()["metadata"]["signature_def"]["signature_def"]
    assert list(found) == ["serving_default", "triple", "negative"]
    assert found["triple"]["inputs"]["x"]["dtype"] == "DT_FLOAT"
    page = client.get("/openapi.json").json()["paths"]["/v1/models/{model}:predict"]["post"]
    schemas = page["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    named = [schema["oneOf"][0]["properties"]["signature_name"] for schema in schemas]
    assert {"const": "triple"} in named
    assert {"const": "negative"} in named


def test_protocol_2_does_not_take_one_for_the_other(client):
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    request = {"inputs": [entry], "parameters": {"signature_name": "triple"}}
    answer = client.post("/v2/models/scale/infer", json=request)
    assert answer.status_code == 400
    assert "`signature_name`" in answer.json()["error"]


def test_an_input_may_be_missing_in_rows_and_columns(client):
    both = {"x": [1, 2], "more": [1, 0]}
    for instances, expected in (
        ([[1, 2]], [[1, 2]]),  # without a name: the one that must be there
        ([{"x": [1, 2]}, {"x": [0, 0]}], [[1, 2], [0, 0]]),
        ([both, both], [[11, 2], [11, 2]]),
    ):
        assert predict(client, "plus", {"instances": instances}).json() == {"predictions": expected}
    for columns, expected in (({"x": [[1, 2]]}, [[1, 2]]), ({"x": [[1, 2]], "more": [[1, 0]]}, [[11, 2]])):
        assert predict(client, "plus", {"inputs": columns}).json() == {"outputs": expected}


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            {"instances": [{"x": [1, 2]}, {"x": [1, 2], "more": [1, 0]}]},
            "must have the same inputs. Received: 'more' in some of them only",
        ),
        ({"instances": [{"more": [1, 0]}]}, "Missing: 'x'"),
        ({"inputs": {"more": [[1, 0]]}}, "Missing: 'x'"),
        ({"inputs": {"x": [[1, 2]], "more": None}}, "must be a list"),
    ],
)
def test_what_must_be_there_must_be_there(client, request_, said):
    answer = predict(client, "plus", request_)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_protocol_2_knows_what_may_be_missing(client):
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
    more = {**entry, "name": "more"}
    for inputs, expected in (([entry], [1, 2]), ([more, entry], [11, 22])):
        answer = client.post("/v2/models/plus/infer", json={"inputs": inputs}).json()
        assert answer["outputs"][0]["data"] == expected
    assert client.post("/v2/models/plus/infer", json={"inputs": [more]}).status_code == 400
    described = client.get("/v2/models/plus").json()
    optional_ = {spec["name"]: spec.get("parameters") for spec in described["inputs"]}
    assert optional_ == {"more": {"optional": True}, "x": None}
    assert client.post("/v2/models/plus/infer", json=client.get("/examples/plus").json()).status_code == 200


def test_the_metadata_says_whether_requests_go_together():
    described = s.Signature((X,), (s.TensorSpec("y", "FP32", (None, 2)),), alone="rows look at each other")
    service = FakeService({("m", 1): (described, None), ("scale", 1): scale(2)})
    client = TestClient(make_app(service))
    assert client.get("/v2/models/m").json()["parameters"] == {
        "requests_together": False,
        "reason": "rows look at each other",
    }
    assert client.get("/v2/models/scale").json()["parameters"] == {"requests_together": True, "reason": ""}


# -- base 64 ------------------------------------------------------------------------------------------------


def infer(client, entry, request=None, model="echo"):
    entry = {"name": "x", "datatype": "BYTES", "shape": [1, 2], **entry}
    return client.post(f"/v2/models/{model}/infer", json={"inputs": [entry], **(request or {})})


BASE64 = {"parameters": {"content_type": "base64"}}


def test_text_in_base_64_is_decoded(client):
    for answer in (
        infer(client, {"data": ["YWI=", ""], **BASE64}),
        infer(client, {"data": [["YWI=", ""]], **BASE64}),
        infer(client, {"data": ["YWI=", ""]}, BASE64),  # of all inputs
        infer(client, {"data": ["ab", ""], "parameters": {"content_type": "str"}}, BASE64),
        infer(client, {"data": ["ab", ""]}),
    ):
        assert answer.json()["outputs"][0]["data"] == ["ab", ""]


def test_text_comes_back_in_base_64(client):
    """Also what is no UTF-8, which JSON cannot hold otherwise."""
    data = {"data": ["/w==", "YQ=="], **BASE64}
    refused = infer(client, data)
    assert refused.status_code == 400
    assert "`content_type`: 'base64'" in refused.json()["error"]
    (output,) = infer(client, data, {"outputs": [{"name": "y", **BASE64}]}).json()["outputs"]
    assert (output["data"], output["parameters"]) == (["/w==", "YQ=="], {"content_type": "base64"})


@pytest.mark.parametrize(
    ("entry", "request_", "said"),
    [
        ({"data": ["ab!", ""], **BASE64}, {}, "must be in base 64, as its `content_type` says"),
        ({"data": ["\u00e4", ""], **BASE64}, {}, "must be in base 64"),
        (
            {"data": ["YQ==", ""]},
            {"outputs": [{"name": "y", "parameters": {"content_type": "base64", "binary_data": True}}]},
            "for BYTES in JSON only. Received: binary",
        ),
    ],
)
def test_what_is_no_base_64_is_refused(client, entry, request_, said):
    answer = infer(client, entry, request_)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_numbers_are_never_in_base_64(client):
    entry = {"datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    answer = infer(client, {**entry, **BASE64}, model="scale")
    assert answer.status_code == 400
    assert "may be 'base64' for BYTES only. Received: an input of FP32" in answer.json()["error"]
    answer = infer(client, entry, {"outputs": [{"name": "y", **BASE64}]}, model="scale")
    assert "for BYTES in JSON only. Received: FP32" in answer.json()["error"]
    assert infer(client, entry, BASE64, model="scale").status_code == 200  # it speaks of texts
