"""Metrics, status, latency, examples, the description and the pages."""

import json
import re

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from hvdext.serving.http.app import make_app
from hvdext.serving.http.latency import Window
from hvdext.serving.openapi import examples
from tests.unit.serving.serving_fakes import FakeService, echo, scale, signature

ROWS = {"instances": [[1, 2, 3]]}


def samples(client, accept="text/plain"):
    text = client.get("/metrics", headers={"Accept": accept}).text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def labels(**named):
    return tuple(sorted(named.items()))


def test_metrics_count_what_was_answered(client):
    for _ in range(3):
        client.post("/v1/models/scale:predict", json=ROWS)
    client.post("/v1/models/scale/versions/1:predict", json={})
    client.post("/v1/models/made-up:predict", json=ROWS)
    binary = {"Inference-Header-Content-Length": "0"}
    client.post("/v2/models/scale/infer", content=np.ones(3, "<f4").tobytes(), headers=binary)

    found = samples(client)

    def requests(model, version, protocol, status):
        of = labels(model=model, version=version, protocol=protocol, status=status)
        return found["hvdext_requests_total", of]

    assert requests("scale", "2", "tensorflow-serving", "200") == 3
    assert requests("scale", "1", "tensorflow-serving", "400") == 1
    assert requests("", "", "tensorflow-serving", "404") == 1  # no label from what a client makes up
    assert requests("scale", "2", "v2-binary", "200") == 1
    of = labels(model="scale", version="2", protocol="tensorflow-serving")
    assert found["hvdext_request_seconds_count", of] == 3
    assert 0 < found["hvdext_request_seconds_sum", of] < 3


def test_metrics_of_the_service(client):
    found = samples(client)
    assert found["hvdext_queue_requests", ()] == 3
    assert found["hvdext_queue_limit", ()] == 256
    assert found["hvdext_draining", ()] == 0
    assert found["hvdext_ranks", labels(state="ready")] == 1
    assert found["hvdext_ranks", labels(state="lost")] == 1
    assert found["hvdext_rank_restarts_total", labels(rank="1")] == 2
    assert found["hvdext_rank_busy_seconds_total", labels(rank="0")] == 1.5
    of = {"model": "mixed", "version": "1"}
    assert found["hvdext_model_ready", labels(**of)] == 1
    assert found["hvdext_model_ranks", labels(**of)] == 2
    assert found["hvdext_model_queue_rows", labels(**of)] == 9
    assert found["hvdext_batches_total", labels(**of)] == 7
    assert found["hvdext_padded_rows_total", labels(**of)] == 6
    # six batches of 8 rows and one of 2
    assert found["hvdext_batch_rows_bucket", labels(**of, le="1.0")] == 0
    assert found["hvdext_batch_rows_bucket", labels(**of, le="4.0")] == 1
    assert found["hvdext_batch_rows_bucket", labels(**of, le="8.0")] == 7
    assert found["hvdext_batch_rows_sum", labels(**of)] == 50
    assert found["process_resident_memory_bytes", ()] > 0


def test_metrics_in_the_format_that_is_asked_for(client):
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    asked = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = client.get("/metrics", headers=asked)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_two_servers_in_one_process_count_for_themselves():
    clients = [TestClient(make_app(FakeService())) for _ in range(2)]
    clients[0].post("/v1/models/scale:predict", json=ROWS)
    of = labels(model="scale", version="2", protocol="tensorflow-serving", status="200")
    assert samples(clients[0])["hvdext_requests_total", of] == 1
    assert ("hvdext_requests_total", of) not in samples(clients[1])


def test_the_window_forgets_and_knows_percentiles():
    now = 100.0
    window = Window(seconds=60, clock=lambda: now)
    assert window.summary() == {
        "window": 0, "requests": 0, "errors": 0, "rate": 0, "p50": None, "p95": None, "p99": None,
    }  # fmt: skip
    for millisecond in range(1, 102):
        window.add(millisecond / 1000, ok=True)
    window.add(9, ok=False)
    now = 110.0
    found = window.summary()
    assert (found["window"], found["requests"], found["errors"], found["rate"]) == (10, 102, 1, 10.2)
    assert [found["p50"], found["p95"], found["p99"]] == pytest.approx([0.051, 0.096, 0.1])
    now = 165.0
    assert window.summary()["requests"] == 0


def test_a_full_window_looks_back_less_far():
    now = 0.0
    window = Window(seconds=60, most=10, clock=lambda: now)
    for second in range(20):
        now = float(second)
        window.add(0.1, ok=True)
    now = 20.0
    assert window.summary()["window"] == 10  # the ten that are left began at 10 s
    assert window.summary()["rate"] == 1


def test_status_has_the_service_and_the_latencies(client, service):
    client.post("/v1/models/scale:predict", json=ROWS)
    client.post("/v1/models/scale:predict", json={})
    found = client.get("/status").json()
    requests = found.pop("requests")
    assert found == service.status()
    assert (requests["requests"], requests["errors"]) == (2, 1)
    assert 0 < requests["p50"] == requests["p99"] < 1


@pytest.mark.parametrize("name", ["mixed", "scale", "scale/versions/1"])
def test_an_example_is_answered(client, name):
    example = client.get(f"/examples/{name}")
    assert example.status_code == 200
    assert client.post(f"/v2/models/{name}/infer", json=example.json()).status_code == 200
    assert client.get("/examples/none").status_code == 404


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "FP16", "FP64", "BYTES"])
def test_examples_of_both_protocols_are_answered(datatype):
    model = echo(datatype)
    client = TestClient(make_app(FakeService({("echo", 1): model})))
    assert client.post("/v2/models/echo/infer", json=examples.v2_example(model[0])).status_code == 200
    assert client.post("/v1/models/echo:predict", json=examples.rows_example(model[0])).status_code == 200


def test_the_description_has_every_route_and_the_models(client):
    document = client.get("/openapi.json").json()
    routes = {
        (re.sub(":hvdext_name", "", route.path), method.lower())
        for route in client.app.routes
        for method in route.methods - {"HEAD"}
    }
    described = {
        (path, method)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == routes
    infer = document["paths"]["/v2/models/{model}/infer"]
    assert infer["parameters"][0]["schema"] == {"type": "string", "enum": ["mixed", "scale"]}
    body = infer["post"]["requestBody"]["content"]["application/json"]
    assert set(body["examples"]) == {"mixed", "scale"}
    assert len(body["schema"]["anyOf"]) == 2  # both versions of "scale" take and give the same
    assert set(infer["post"]["responses"]) == {
        "200", "400", "403", "404", "408", "413", "415", "500", "503", "504",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("datatype", "largest", "beyond"), [("FP16", 65519.99, 65520), ("FP32", 3.4028235e38, 3.4028236e38)]
)
def test_the_description_knows_where_numbers_leave_their_datatype(datatype, largest, beyond):
    client = TestClient(make_app(FakeService({("echo", 1): echo(datatype)})))
    path = "/v1/models/{model}:predict"
    body = client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
    text = json.dumps(body["application/json"]["schema"])
    limit = float(re.search(r'"exclusiveMaximum": ([^,}]*)', text)[1])
    assert largest < limit <= beyond
    for value, status in ((largest, 200), (limit, 400)):
        assert client.post("/v1/models/echo:predict", json={"instances": [[value]]}).status_code == status


def test_the_description_speaks_of_keys_where_there_are_some():
    client = TestClient(make_app(FakeService(), api_keys=["k" * 20]))
    document = client.get("/openapi.json", headers={"X-API-Key": "k" * 20}).json()
    assert document["security"] == [{"bearer": []}, {"header": []}]
    assert "401" in document["paths"]["/v2"]["get"]["responses"]
    live = document["paths"]["/v2/health/live"]["get"]
    assert live["security"] == []
    assert "401" not in live["responses"]


def _lists(schema):
    if isinstance(schema, dict):
        if schema.get("type") == "array" or "array" in (schema.get("type") or []):
            yield schema
        for value in schema.values():
            yield from _lists(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _lists(value)


@pytest.mark.parametrize("models", [{}, {("echo", 1): echo("BYTES")}, None])
def test_every_list_in_the_description_says_what_it_holds(models):
    document = TestClient(make_app(FakeService(models))).get("/openapi.json").json()
    found = list(_lists(document))
    assert len(found) > 20
    assert [schema for schema in found if "items" not in schema] == []


@pytest.mark.parametrize("text", ["", "YQ==", "YWI=", "YWJj", "YWJjYQ=="])
def test_the_description_takes_every_length_of_base_64(text):
    client = TestClient(make_app(FakeService({("echo", 1): echo("BYTES")})))
    found = json.dumps(client.get("/openapi.json").json()["paths"]["/v1/models/{model}:predict"])
    pattern = json.loads(re.search(r'"b64": {"type": "string", "pattern": ("[^"]*")', found)[1])
    assert re.search(pattern, text)
    answer = client.post("/v1/models/echo:predict", json={"instances": [[{"b64": text}]]})
    assert answer.status_code == 200
    assert not re.search(pattern, "YQ=")


def test_large_examples_stay_out_of_the_description():
    large = signature({"x": ("FP32", (None, 100, 100))}, {"y": ("FP32", (None, 1))}), None
    client = TestClient(make_app(FakeService({("large", 1): large, ("scale", 1): scale(2)})))
    document = client.get("/openapi.json")
    body = document.json()["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]
    assert set(body["content"]["application/json"]["examples"]) == {"scale"}
    assert len(document.content) < 100_000


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_fetch_nothing_from_outside_and_run_only_their_own_code(client, path):
    page = client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.findall(r"""(?:src|href)=["'](?!/|data:|#)""", page.text)
    assert "@import" not in page.text
    assert not re.findall(r"""\son\w+=|\sstyle=""", page.text)  # the policy would block them
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_the_docs_escape_what_models_are_called():
    name = "<script>alert(1)</script>"
    client = TestClient(make_app(FakeService({(name, 1): scale(2)})))
    assert "<script>" not in client.get("/docs").text
    assert "&lt;script&gt;" in client.get("/docs").text
    assert json.loads(client.get("/openapi.json").text)
