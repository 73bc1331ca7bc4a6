"""Clients that no one here wrote, with a server on two ranks: tritonclient, curl, a browser, schemathesis."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.clients import browser
from tests.clients.fuzzing import fuzz
from tests.clients.triton_inputs import asked
from tests.multiprocess.launching.launch import running

triton = pytest.importorskip("tritonclient.http")

pytestmark = pytest.mark.multiprocess

_DEADLINE = 240.0  # seconds for everything in this file
_READY = 90.0  # seconds for two ranks to import TensorFlow and load
_DOCS = Path(__file__).parents[2] / "docs" / "serving_protocols.md"
_KERNEL = np.float32([[1, 0, 0], [0, 2, 0], [0, 0, 3], [1, 1, 1]])
FLOWER = np.float32([[5.1, 3.5, 1.4, 0.2]])


class Texts(tf.Module):
    """Words in capitals, with a number that comes back as it was."""

    @tf.function(
        input_signature=[tf.TensorSpec([None, 2], tf.string, "words"), tf.TensorSpec([None], tf.int64, "id")]
    )
    def __call__(self, words, id):
        return {"capitals": tf.strings.upper(words), "id_back": id}


def save_models(folder):
    x = keras.Input((4,), name="x")
    y = keras.layers.Dense(3, use_bias=False, name="y")
    model = keras.Model(x, y(x))
    y.set_weights([_KERNEL])
    model.save(folder / "iris.keras")
    texts = Texts()
    tf.saved_model.save(texts, str(folder / "texts"), signatures=texts.__call__)
    return folder / "iris.keras", folder / "texts"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "-m",
        "hvdext.cli",
        "serve",
        *map(str, save_models(folder)),
        "--port",
        str(port),
        "--threads",
        "1",
    ]
    with running(2, *command, timeout=_DEADLINE) as job:
        end = time.monotonic() + _READY
        while not _is_ready(port):
            assert job.process.poll() is None, job.output
            assert time.monotonic() < end, job.output
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"


def _is_ready(port):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).status == 200
    return False


@pytest.fixture
def client(address):
    with contextlib.closing(triton.InferenceServerClient(address)) as client:
        yield client


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient(client, binary):
    assert client.is_model_ready("iris")
    assert client.get_model_metadata("iris")["parameters"]["requests_together"]
    assert client.get_model_metadata("iris")["inputs"] == [
        {"name": "x", "datatype": "FP32", "shape": [-1, 4]}
    ]
    x = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    result = client.infer("iris", [asked("x", x, "FP32", binary)], outputs=wanted, request_id="a")
    np.testing.assert_allclose(result.as_numpy("y"), x @ _KERNEL, rtol=1e-5)
    assert result.get_response()["id"] == "a"


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_with_text(client, binary):
    words = np.array([[b"one", b""], [b"three", "vier \u00e4".encode()]], object)
    inputs = [asked("words", words, "BYTES", binary), asked("id", np.array([2**60, -1]), "INT64", binary)]
    result = client.infer("texts", inputs)
    assert result.as_numpy("capitals").tolist() == [[b"ONE", b""], [b"THREE", "VIER \u00e4".encode()]]
    assert result.as_numpy("id_back").tolist() == [2**60, -1]


def test_many_tritonclients_get_their_own_answers(address):
    """Each asks with numbers of its own, in rows that share batches with those of the others."""
    wrong = []

    def ask(number):
        with contextlib.closing(triton.InferenceServerClient(address)) as client:
            for step in range(25):
                x = np.full((1 + step % 3, 4), 1000 * number + step, np.float32)
                answer = client.infer("iris", [asked("x", x, "FP32", step % 2 == 0)]).as_numpy("y")
                if not np.array_equal(answer, x @ _KERNEL):
                    wrong.append((number, step, answer))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    with urllib.request.urlopen(f"http://{address}/status", timeout=10) as answer:
        assert all(rank["batches"] > 0 for rank in json.load(answer)["ranks"])  # both ranks computed


def documented(language="sh"):
    """The commands of the documentation, block by block."""
    return re.findall(rf"```{language}\n(.*?)```", _DOCS.read_text(), re.DOTALL)


def run_documented(block, address, folder):
    script = block.replace("localhost:8000", address).replace("curl ", "curl --silent --show-error --fail ")
    return subprocess.run(
        ["sh", "-ec", script], cwd=folder, timeout=30, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_the_curl_commands_of_the_documentation(address, tmp_path):
    blocks = documented()
    printed = run_documented(blocks[0], address, tmp_path)
    found, position = [], 0
    while position < len(printed):  # one JSON text after the other
        answer, position = json.JSONDecoder().raw_decode(printed, position)
        found.append(answer)
    metadata, zeros, rows, tensors = found
    assert metadata["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert zeros["outputs"][0]["data"] == [0, 0, 0]
    np.testing.assert_allclose(rows["predictions"], FLOWER @ _KERNEL, rtol=1e-5)
    np.testing.assert_allclose([tensors["outputs"][0]["data"]], FLOWER @ _KERNEL, rtol=1e-5)

    run_documented(next(block for block in blocks if "printf" in block), address, tmp_path)
    tail = (tmp_path / "answer").read_bytes()[-12:]
    np.testing.assert_allclose(np.frombuffer(tail, "<f4"), (FLOWER @ _KERNEL)[0], rtol=1e-5)


def test_the_python_of_the_documentation(address, capsys):
    (block,) = (block for block in documented("python") if "tritonclient" in block)
    exec(block.replace("localhost:8000", address), {})
    printed = [float(word) for word in capsys.readouterr().out.strip("[] \n").split()]
    np.testing.assert_allclose([printed], FLOWER @ _KERNEL, rtol=1e-5)


def test_a_prediction_in_the_page(address):
    with browser.chromium() as driver:
        driver.get(f"http://{address}/")
        browser.wait_for(driver, lambda d: browser.element(d, "state").text == "ready")
        example = json.loads(browser.example_shown(driver))
        assert example["inputs"][0]["shape"] == [1, 4]
        example["inputs"][0]["data"] = FLOWER.tolist()
        caption, answer = browser.predict(driver, json.dumps(example))
        assert caption.startswith("Answer: status 200"), answer
        np.testing.assert_allclose([json.loads(answer)["outputs"][0]["data"]], FLOWER @ _KERNEL, rtol=1e-5)
        assert "iris" in browser.element(driver, "models").text
        assert browser.element(driver, "ranks").text.count("ready") == 2
        assert browser.complaints(driver) == []


def test_schemathesis_finds_no_fault(address, tmp_path):
    cases = fuzz(
        f"http://{address}",
        tmp_path,
        *("--phases", "examples,fuzzing", "--max-examples", "3", "--exclude-path-regex", "unload"),
        timeout=120,
    )
    assert cases >= 60
