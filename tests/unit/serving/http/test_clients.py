"""Clients that no one here wrote, over real sockets: tritonclient, curl, schemathesis, a browser."""

import contextlib
import json
import shutil
import subprocess

import numpy as np
import pytest

from hvdext.serving import service as s
from tests.clients import browser
from tests.clients.fuzzing import fuzz
from tests.clients.triton_inputs import asked
from tests.unit.serving.http.http_server import serving
from tests.unit.serving.serving_fakes import FakeService, echo, mixed, scale

triton = pytest.importorskip("tritonclient.http")
from tritonclient.utils import InferenceServerException  # noqa: E402

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def address():
    echoes = {(f"echo-{datatype}", 1): echo(datatype) for datatype in ("FP16", "BOOL", "UINT64")}
    service = FakeService({("scale", 1): scale(2), ("scale", 2): scale(3), ("mixed", 1): mixed(), **echoes})
    service.stored = {("later", 1): scale(5)}
    with serving(service) as address:
        yield address


@pytest.fixture
def client(address):
    with contextlib.closing(triton.InferenceServerClient(address)) as client:
        yield client


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_infers(client, binary, compression):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = client.infer(
        "scale",
        [asked("x", x, "FP32", binary)],
        model_version="1",
        outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
        request_id="42",
        timeout=5_000_000,
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), x * 2)
    assert result.get_response()["id"] == "42"
    assert result.get_response()["model_version"] == "1"


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_with_several_inputs_and_text(client, binary):
    inputs = [
        asked("text", np.array([[b"a"], ["ö".encode()]], object), "BYTES", binary),
        asked("ids", np.array([1, 2**60]), "INT64", not binary),
        asked("image", np.full((2, 2, 2), 200, np.uint8), "UINT8", binary),
    ]
    result = client.infer("mixed", inputs)  # without outputs, the client asks for all of them in binary
    assert result.as_numpy("upper").tolist() == [[b"A"], ["ö".encode()]]
    assert result.as_numpy("ids").tolist() == [1, 2**60]
    assert result.as_numpy("total").tolist() == [100.0, 100.0]


@pytest.mark.parametrize(("datatype", "dtype"), [("FP16", "f2"), ("BOOL", "?"), ("UINT64", "u8")])
def test_tritonclient_with_other_datatypes(client, datatype, dtype):
    x = np.array([[0, 1, 1]], dtype)
    result = client.infer(f"echo-{datatype}", [asked("x", x, datatype, True)])
    assert result.as_numpy("y").dtype == dtype
    np.testing.assert_array_equal(result.as_numpy("y"), x)


def test_tritonclient_asks_for_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scale")
    assert client.is_model_ready("scale", "1")
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["name"] == "hvdext"
    assert client.get_model_metadata("scale")["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 3]}
    ]


def test_tritonclient_loads_and_unloads(client):
    index = {(entry["name"], entry["state"]) for entry in client.get_model_repository_index()}
    assert ("later", "UNAVAILABLE") in index
    client.load_model("later")
    x = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(client.infer("later", [asked("x", x, "FP32", True)]).as_numpy("y"), x * 5)
    client.unload_model("later")
    with pytest.raises(InferenceServerException, match="no model 'later'"):
        client.infer("later", [asked("x", x, "FP32", True)])


def test_tritonclient_is_told_what_was_wrong(client):
    with pytest.raises(InferenceServerException, match="must be 'FP32'") as raised:
        client.infer("scale", [asked("x", np.ones((1, 3)), "FP64", True)])
    assert raised.value.status() == "400"


def curl(*arguments):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    ended = subprocess.run(
        ["curl", "--silent", "--show-error", "--max-time", "20", *arguments], capture_output=True, check=True
    )
    return json.loads(ended.stdout)


def test_curl_without_any_header(address):
    predict = curl("-d", '{"instances": [[1, 2, 3]]}', f"http://{address}/v1/models/scale:predict")
    assert predict == {"predictions": [[3, 6, 9]]}
    example = curl(f"http://{address}/examples/scale")
    answer = curl("-d", json.dumps(example), f"http://{address}/v2/models/scale/infer")
    assert answer["outputs"][0]["data"] == [0, 0, 0]


def test_curl_with_a_body_that_is_too_large(tmp_path):
    large = tmp_path / "large"
    large.write_bytes(b" " * 5_000_000)
    with serving(FakeService(), max_request_bytes=1_000_000) as address:
        for more in ([], ["-H", "Expect:"], ["-H", "Transfer-Encoding: chunked", "-H", "Expect:"]):
            answer = curl("--data-binary", f"@{large}", *more, f"http://{address}/v2/models/scale/infer")
            assert answer == {"error": "The body must not exceed 1000000 bytes after decompression."}


@pytest.mark.slow
def test_schemathesis_finds_no_fault(address, tmp_path):
    phases = ("--phases", "examples,fuzzing", "--max-examples", "2", "--exclude-path-regex", "unload")
    assert fuzz(f"http://{address}", tmp_path, *phases) >= 40


@pytest.mark.slow
def test_a_model_is_tried_in_the_page(address):
    with browser.chromium() as driver:
        driver.get(f"http://{address}/")
        browser.element(driver, "model").send_keys("scale, version 1")
        browser.wait_for(driver, lambda d: '"FP32"' in browser.element(d, "request").get_property("value"))
        example = json.loads(browser.example_shown(driver))
        assert example["inputs"][0]["data"] == [[0, 0, 0]]
        example["inputs"][0]["data"] = [[1, 2.5, 3]]
        caption, answer = browser.predict(driver, json.dumps(example))
        assert caption.startswith("Answer: status 200")
        assert json.loads(answer)["outputs"][0]["data"] == [2, 5, 6]
        _, answer = browser.predict(driver, '{"instances": [[2, 2, 2]]}')
        assert json.loads(answer) == {"predictions": [[4, 4, 4]]}
        assert browser.complaints(driver) == []

        caption, answer = browser.predict(driver, '{"instances": [[2, 2]]}')
        assert caption.startswith("Answer: status 400")
        assert answer.startswith("The shape of input 'x' must be [any, 3]")
        assert browser.element(driver, "state").text == "ready"
        assert "scale" in browser.element(driver, "models").text
        assert "lost" in browser.element(driver, "ranks").text
        driver.get(f"http://{address}/docs")
        assert "/v2/models/{model}/infer" in driver.page_source
        assert len(browser.complaints(driver)) == 1  # the 400 of before


@pytest.mark.slow
def test_the_page_asks_for_a_key():
    service = FakeService()
    service.states["mixed", 1] = s.State.UNAVAILABLE, "<b>rank 1</b> is lost"
    with (
        serving(service, api_keys=[KEY], allowed_hosts=["127.0.0.1"]) as address,
        browser.chromium() as driver,
    ):
        driver.get(f"http://{address}/")
        browser.wait_for(driver, lambda d: browser.element(d, "state").text == "key needed")
        browser.element(driver, "key").send_keys(KEY + "\n")
        browser.wait_for(driver, lambda d: browser.element(d, "state").text == "partly ready")
        assert "<b>rank 1</b> is lost" in browser.element(driver, "models").text
        browser.example_shown(driver)
        browser.wait_for(driver, lambda d: not browser.element(d, "key-card").is_displayed())
        assert browser.predict(driver)[0].startswith("Answer: status")
