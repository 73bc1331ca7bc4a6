"""`hvdext serve` on two ranks, as users start it: right answers, also while ranks die and models change."""

from __future__ import annotations

import collections
import concurrent.futures
import http.client
import itertools
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import psutil
import pytest

from tests.multiprocess.launching.launch import running
from tests.multiprocess.programs import serving_layers

pytestmark = pytest.mark.multiprocess

_HERE = Path(__file__).parent
_READY = 90.0  # seconds for two ranks to import TensorFlow and load


def save(path, factor, layers=1):
    """A model that `layers` times multiplies by `factor` and adds 1; exact in float32."""
    inputs = keras.Input((2,), name="x")
    x = inputs
    for number in range(layers):
        dense = keras.layers.Dense(2, use_bias=False, name=f"dense{number}")
        x = serving_layers.PlusOne(name=f"plus{number}")(dense(x))
        dense.set_weights([np.eye(2, dtype=np.float32) * factor])
    path.parent.mkdir(parents=True, exist_ok=True)
    keras.Model(inputs, x).save(path)


class Server:
    """A server that runs, and its client.

    Args:
        job: what was launched.
        port: of the server.
        certificate: the server's file, to ask it by TLS; None: without.
        key: for the API.
    """

    def __init__(self, job, port, certificate=None, key=None):
        self.job = job
        self.port = port
        self.headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
        self._tls = None
        if certificate:
            self._tls = ssl.create_default_context(cafile=certificate)

    def get(self, path, connection=None):
        return self._ask("GET", path, None, connection)

    def post(self, path, body, connection=None):
        return self._ask("POST", path, json.dumps(body), connection)

    def predict(self, *values, connection=None):
        """The status and, for each value, the model's first output."""
        body = {"instances": [[value, value] for value in values]}
        status, answer = self.post("/v1/models/m:predict", body, connection)
        return status, [row[0] for row in answer["predictions"]] if status == 200 else answer

    def connect(self):
        if self._tls is None:
            return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        return http.client.HTTPSConnection("localhost", self.port, timeout=20, context=self._tls)

    def _ask(self, method, path, body, connection):
        own = connection or self.connect()
        try:
            own.request(method, path, body, self.headers)
            response = own.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None
        finally:
            if connection is None:
                own.close()

    def status(self):
        return self.get("/status")[1]

    def until(self, condition, seconds, what):
        end = time.monotonic() + seconds
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass
            assert time.monotonic() < end, f"not within {seconds} s: {what}\n{self.job.output}"
            assert self.job.process.poll() is None, self.job.output
            time.sleep(0.05)

    def ready(self):
        return self.get("/v2/health/ready")[0] == 200

    def front(self):
        return int(re.search(r"to drain and end: kill (\d+)", self.job.output).group(1))


def serve(*arguments, timeout):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = ["--port", port, "--threads", 1, "--import", serving_layers.__name__]
    arguments = ["-m", "hvdext.cli", "serve", *map(str, (*arguments, *shared))]
    return running(2, *arguments, timeout=timeout), port


class Clients:
    """Threads that ask for ever other numbers; each keeps its connection.

    Args:
        server: whom they ask.
        right: what may be answered to a number.
        number: how many.
        stop_at: the status after which a thread goes elsewhere.
    """

    def __init__(self, server, right, number=6, stop_at=None):
        self._server, self._right, self._stop_at = server, right, stop_at
        self._values = itertools.count(1)
        self._end = threading.Event()
        self.statuses = collections.Counter()
        self.errors = []
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(number)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info):
        self._end.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a request hangs"

    def wait_for(self, answers):
        """Until so many more requests have been answered by 200."""
        goal = self.statuses[200] + answers
        self._server.until(lambda: self.statuses[200] >= goal, 30, f"{answers} answers: {self.statuses}")

    def _work(self):
        connection = self._server.connect()
        try:
            while not self._end.is_set():
                value = next(self._values)
                status, answer = self._server.predict(value, connection=connection)
                self.statuses[status] += 1
                if status == 200:
                    if answer not in [[right] for right in self._right(value)]:
                        self.errors.append((value, answer))
                elif status == self._stop_at:
                    return
                else:
                    time.sleep(0.01)
        except Exception as error:
            self.errors.append(error)
        finally:
            connection.close()


def test_replicas(tmp_path):
    repository = tmp_path / "repository"
    save(repository / "m" / "1" / "model.keras", 2)
    launched, port = serve("--repository", repository, timeout=170)
    with launched as job:
        server = Server(job, port)
        server.until(server.ready, _READY, "ready")
        _answers_are_right(server, repository)
        _models_of_other_kinds(server, repository)
        _a_killed_worker_comes_back(server)
        _a_new_version_takes_over(server, repository)
        _sigterm_loses_no_request(server)
        assert job.process.wait(10) == 0, job.output
        lines = [line for line in job.output.splitlines() if "<stdout>" in line]
        assert all(line.startswith("[0]<stdout>:hvdext serve: ") for line in lines), job.output
        assert any("m:1 (keras) on ranks 0, 1" in line for line in lines)


def _answers_are_right(server, repository):
    model = keras.models.load_model(repository / "m" / "1" / "model.keras")
    rows = np.random.default_rng(0).normal(size=(70, 2)).astype(np.float32)
    _, answer = server.post("/v1/models/m:predict", {"instances": rows.tolist()})
    np.testing.assert_allclose(answer["predictions"], model.predict(rows, verbose=0), rtol=1e-6)
    ranks = server.status()["ranks"]
    assert [rank["state"] for rank in ranks] == ["ready", "ready"]
    assert [rank["batches"] > 0 for rank in ranks] == [True, True]  # 70 rows are three batches
    # Supervisors, the front among them, have no TensorFlow; idle ranks use no time.
    front = psutil.Process(server.front())
    family = [psutil.Process(rank["pid"]) for rank in ranks]
    supervisors = [worker.parent() for worker in family]
    assert front in supervisors
    assert not any("tensorflow" in Path(f"/proc/{p.pid}/maps").read_text() for p in supervisors)
    assert all("tensorflow" in Path(f"/proc/{p.pid}/maps").read_text() for p in family)
    before = [sum(p.cpu_times()[:2]) for p in [*family, *supervisors]]
    time.sleep(1)
    after = [sum(p.cpu_times()[:2]) for p in [*family, *supervisors]]
    assert max(b - a for a, b in zip(before, after, strict=True)) < 0.2


def _models_of_other_kinds(server, repository):
    """Rows that look at each other; built by its first batch; words as answers; one that cannot be loaded."""
    layers, x = keras.layers, keras.Input((2,), name="x")
    keras.Model(x, x - keras.ops.mean(x, 0, keepdims=True)).save(repository / "centred.keras")
    called = keras.Sequential([layers.Dense(2, kernel_initializer="identity")])
    called(np.ones((16, 2)))
    called.save(repository / "called.keras")
    lookup = layers.StringLookup(vocabulary=["cat", "dog"], invert=True, num_oov_indices=0)
    keras.Model(x, lookup(keras.ops.argmax(x, -1))).save(repository / "label.keras")
    (repository / "broken.keras").write_text("nothing that can be read")
    for name, expected in (("centred", 200), ("called", 200), ("label", 200), ("broken", 400)):
        status, answer = server.post(f"/v2/repository/models/{name}/load", {})
        assert status == expected, answer
        assert server.ready()

    def predict(name, rows):
        return server.post(f"/v1/models/{name}:predict", {"instances": rows})[1]["predictions"]

    asked = [[[value, 0.0], [value + 4.0, 2.0]] for value in range(20)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda rows: predict("centred", rows), asked))
    assert answers == [[[-2, -1], [2, 1]]] * 20  # whoever else asks
    assert "each request is computed by itself" in server.job.output
    assert predict("called", [[1, 2]]) == [[1, 2]]
    assert predict("label", [[0, 1], [1, 0], [0, 1]]) == ["dog", "cat", "dog"]
    for name in ("centred", "called", "label", "broken"):
        (repository / f"{name}.keras").unlink()
        assert server.post(f"/v2/repository/models/{name}/unload", {})[0] == 200


def _a_killed_worker_comes_back(server):
    with Clients(server, lambda value: [2 * value + 1]) as clients:
        clients.wait_for(100)
        victim = server.status()["ranks"][1]["pid"]
        os.kill(victim, signal.SIGKILL)
        clients.wait_for(100)  # from the other rank
        assert server.status()["ranks"][1]["state"] != "ready"
        server.until(lambda: server.status()["ranks"][1]["state"] == "ready", 60, "rank 1 is back")
        before = server.status()["ranks"][1]["batches"]
        server.until(lambda: server.status()["ranks"][1]["batches"] > before, 10, "rank 1 computes")
    assert not clients.errors, clients.errors
    # What it had is computed by the other rank, so not even those in flight need fail.
    assert set(clients.statuses) == {200}
    rank = server.status()["ranks"][1]
    assert rank["restarts"] == 1
    assert rank["pid"] != victim


def _a_new_version_takes_over(server, repository):
    save(repository / "m" / "2" / "model.keras", 3)
    with Clients(server, lambda value: [2 * value + 1, 3 * value + 1]) as clients:
        clients.wait_for(20)
        status, answer = server.post("/v2/repository/models/m/load", {})
        assert status == 200, answer
        assert server.predict(10) == (200, [31])
        clients.wait_for(20)
    assert not clients.errors, clients.errors
    assert set(clients.statuses) == {200}
    assert server.post("/v1/models/m/versions/1:predict", {"instances": [[10, 10]]})[1] == {
        "predictions": [[21, 21]]
    }


def _sigterm_loses_no_request(server):
    with Clients(server, lambda value: [3 * value + 1], number=8, stop_at=503) as clients:
        clients.wait_for(100)
        os.kill(server.front(), signal.SIGTERM)
        start = time.monotonic()
        server.job.process.wait(20)
    assert time.monotonic() - start < 10
    assert not clients.errors, clients.errors
    assert set(clients.statuses) == {200, 503}
    assert clients.statuses[503] <= 8


def test_pipeline(tmp_path):
    save(tmp_path / "m.keras", 2, layers=4)
    key = tmp_path / "keys"
    key.write_text("a key for these tests".replace(" ", "-"))
    key.chmod(0o600)
    certificate, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 {subject} -out {certificate} -keyout {private}"
    )
    subprocess.run(command.split(), check=True, capture_output=True, timeout=30)
    tls = ["--tls-cert", certificate, "--tls-key", private, "--api-key-file", key]
    launched, port = serve(tmp_path / "m.keras", "--mode", "pipeline", *tls, timeout=170)
    with launched as job:
        stranger = Server(job, port, certificate)
        server = Server(job, port, certificate, key.read_text())
        server.until(server.ready, _READY, "ready")
        assert stranger.predict(1)[0] == 401
        assert server.predict(*range(40)) == (200, [16 * value + 15 for value in range(40)])
        ranks = server.status()["ranks"]
        assert ranks[0]["batches"] == ranks[1]["batches"] == 2
        with Clients(server, lambda value: [16 * value + 15]) as clients:
            clients.wait_for(50)
            os.kill(ranks[1]["pid"], signal.SIGKILL)
            server.until(lambda: clients.statuses[503] > 0, 10, "503 while a stage is missing")
            server.until(server.ready, 60, "ready again")
            clients.wait_for(50)
        assert not clients.errors, clients.errors
        assert set(clients.statuses) <= {200, 500, 503}
        assert clients.statuses[500] <= 6  # those in flight
        # horovodrun itself may be asked to end, too. Its exit code says nothing: it kills the shells between
        # itself and its ranks as soon as the ranks have ended.
        with Clients(server, lambda value: [16 * value + 15], stop_at=503) as clients:
            clients.wait_for(20)
            os.kill(job.process.pid, signal.SIGTERM)
            job.process.wait(15)
        assert not clients.errors, clients.errors
        assert set(clients.statuses) == {200, 503}
        assert "hvdext serve: ended" in job.output
        assert not [rank["pid"] for rank in ranks if psutil.pid_exists(rank["pid"])]


def test_example(tmp_path):
    """The script serves a saved model, asks it and ends by itself."""
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    model.save(tmp_path / "model.keras")
    script = _HERE.parents[1] / "examples" / "serve.sh"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launcher = f"{sys.executable} {_HERE / 'launching' / 'quick_horovodrun.py'}"
    # Where `hvdext` is not installed from here, a file of that name runs this one.
    (tmp_path / "hvdext").write_text(f'#!/bin/sh\nexec {sys.executable} -m hvdext.cli "$@"\n')
    (tmp_path / "hvdext").chmod(0o755)
    environment = {"HOROVODRUN": launcher, "PORT": str(port), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["sh", script, tmp_path / "model.keras"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0] == f"ready: http://localhost:{port}"
    assert json.loads(lines[2])["inputs"][0]["shape"] == [-1, 8, 8, 1]
    (output,) = json.loads(lines[4])["outputs"]
    assert output["shape"] == [1, 10]
    assert output["data"] == [0] * 10  # no pixels, and biases that were never trained
    assert lines[-1] == "drained"
