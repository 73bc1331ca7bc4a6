"""Requests and answers that take long to read and to write: others go on meanwhile."""

import asyncio
import gc
import json
import threading

import numpy as np
import pytest

from hvdext.serving.http.app import make_app
from hvdext.serving.http.offload import Offload
from hvdext.serving.protocols import tf_serving, v2
from hvdext.serving.protocols.json_text import in_parts, read_json, write_json
from hvdext.serving.protocols.tensors import from_nested
from hvdext.serving.service import InvalidRequest, TensorSpec
from tests.unit.serving.http.asgi_calls import call, receiving
from tests.unit.serving.serving_fakes import FakeService, echo, scale, signature

PREDICT, INFER, LIVE = "/v1/models/scale:predict", "/v2/models/scale/infer", "/v2/health/live"
ROWS = [[1, 2, 3]] * 40_000
TF = json.dumps({"instances": ROWS}).encode()
DATA = {"name": "x", "datatype": "FP32", "shape": [len(ROWS), 3], "data": ROWS}
V2 = json.dumps({"inputs": [DATA]}).encode()


class Held:
    """Stands for a function, and waits in it until it is let go, on another thread than the event loop's."""

    def __init__(self, monkeypatch, module, name):
        self._function = getattr(module, name)
        self.begun = asyncio.Event()
        self.go = threading.Event()
        self.running = self.most = self.times = 0
        self.loop = asyncio.get_running_loop()
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args):
        self.times += 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.go.wait(10), "the event loop was held up"
        self.running -= 1
        return self._function(*args)


def run(program):
    """Runs it on a loop of its own, for 30 s at most."""
    return asyncio.run(asyncio.wait_for(program(), 30))


@pytest.mark.parametrize("name", ["read_request", "write_answer"])
@pytest.mark.parametrize(("module", "path", "body"), [(tf_serving, PREDICT, TF), (v2, INFER, V2)])
def test_others_are_answered_meanwhile(monkeypatch, module, path, body, name):
    async def program():
        app = make_app(FakeService({("scale", 1): scale(2)}))
        held = Held(monkeypatch, module, name)
        large = asyncio.create_task(call(app, path, receiving(body)))
        await held.begun.wait()
        assert await call(app, LIVE, receiving(b""), method="GET") == (200, b'{"live":true}')
        held.go.set()
        status, text = await large
        assert status == 200
        answer = json.loads(text)
        expected = (2.0 * np.array(ROWS)).tolist()
        if module is tf_serving:
            assert answer == {"predictions": expected}
        else:
            assert answer["outputs"][0]["data"] == np.ravel(expected).tolist()

    run(program)


def test_no_cycles_are_searched_for_in_what_is_read():
    async def program():
        return await Offload(1.0).run(gc.isenabled)

    assert run(program) is False
    assert gc.isenabled()


def test_numbers_in_binary_wait_for_no_one(monkeypatch):
    async def program():
        app = make_app(FakeService({("scale", 1): scale(2)}))
        held = Held(monkeypatch, tf_serving, "read_request")
        large = asyncio.create_task(call(app, PREDICT, receiving(TF)))
        await held.begun.wait()
        rows = np.array(ROWS, np.float32)
        headers = [(b"inference-header-content-length", b"0")]
        status, text = await call(app, INFER, receiving(rows.tobytes()), headers)
        assert status == 200
        assert text.endswith((2 * rows).tobytes())
        held.go.set()
        assert (await large)[0] == 200

    run(program)


def test_large_requests_are_read_one_after_another(monkeypatch):
    async def program():
        app = make_app(FakeService({("scale", 1): scale(2)}))
        held = Held(monkeypatch, tf_serving, "read_request")
        leaves = asyncio.Event()
        tasks = [asyncio.create_task(call(app, PREDICT, receiving(TF))) for _ in range(2)]
        await held.begun.wait()
        left = asyncio.create_task(call(app, PREDICT, receiving(TF, leaves)))
        small = await asyncio.wait_for(call(app, INFER, receiving(b"[]")), 5)
        assert small[0] == 400
        leaves.set()
        assert await left == (None, b"")
        held.go.set()
        assert [(await task)[0] for task in tasks] == [200, 200]
        assert (held.times, held.most) == (2, 1)  # that of the client that has left was never read

    run(program)


def test_the_turn_to_be_read_does_not_take_for_ever(monkeypatch):
    async def program():
        app = make_app(FakeService({("scale", 1): scale(2)}), receive_seconds=0.2)
        held = Held(monkeypatch, tf_serving, "read_request")
        first = asyncio.create_task(call(app, PREDICT, receiving(TF)))
        await held.begun.wait()
        status, text = await call(app, PREDICT, receiving(TF))
        assert status == 503
        assert "one after another, and this one has waited for 0.2 s" in json.loads(text)["error"]
        held.go.set()
        assert (await first)[0] == 200

    run(program)


def test_it_is_read_again_for_a_version_that_came_meanwhile(monkeypatch):
    async def program():
        service = FakeService({("scale", 1): scale(2)})
        held = Held(monkeypatch, tf_serving, "read_request")
        task = asyncio.create_task(call(make_app(service), PREDICT, receiving(TF)))
        await held.begun.wait()
        wider = {"x": ("FP32", (None, 4))}
        service.models["scale", 2] = signature(wider, {"y": wider["x"]}), lambda inputs: {"y": inputs["x"]}
        held.go.set()
        status, text = await task
        assert (status, held.times) == (400, 2)
        assert "[any, 4]" in json.loads(text)["error"]

    run(program)


def test_what_is_wrong_in_a_large_request_is_said(monkeypatch):
    async def program():
        app = make_app(FakeService({("scale", 1): scale(2)}))
        status, text = await call(app, PREDICT, receiving(TF[:-1]))
        assert (status, "must be JSON in UTF-8" in json.loads(text)["error"]) == (400, True)
        status, text = await call(app, PREDICT, receiving(TF[:-3] + b', [1, 2, "a"]]}'))
        assert (status, gc.isenabled()) == (400, True)

    run(program)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ([1], "lists at depth 1 must be of one length. Received: lengths 1 and 2"),
        (5, "it holds lists and a whole number"),
        ([1, "a"], "whole numbers, without a decimal point. Received: a string, 'a'"),
        ([1, 256], "range of UINT8, 0 to 255. Received: 256"),
    ],
)
def test_a_fault_is_found_in_the_last_of_many_values(last, said):
    with pytest.raises(InvalidRequest, match=said):
        from_nested([[1, 2]] * 50_000 + [last], TensorSpec("x", "UINT8", (None, 2)))


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "UINT64", "FP16", "FP64"])
def test_many_values_are_read_as_they_are(datatype):
    values = [[i % 2 == 1, i % 3 == 1] if datatype == "BOOL" else [i % 200, i % 7] for i in range(50_000)]
    array = from_nested(values, TensorSpec("x", datatype, (None, 2)))
    assert array.tolist() == values


@pytest.mark.parametrize(
    "shape", [(200_000,), (2, 100_000), (2, 2, 70_000), (50_000, 3), (70_000, 1, 1), (0, 3)]
)
def test_long_arrays_are_written_as_short_ones(shape):
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape) / 4
    assert read_json(write_json(in_parts(array))) == array.tolist()
    assert read_json(write_json(in_parts(array.T.astype(">f4")))) == array.T.tolist()


def test_long_answers_in_rows_of_several_outputs():
    shapes = {"a": (40_000, 2), "b": (40_000,), "c": (40_000,)}
    specs = {name: ("FP32", (None, *shape[1:])) for name, shape in shapes.items()}
    outputs = {
        name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()
    }
    outputs["c"] = np.array([b"text"] * 40_000, object)
    described = signature({}, {**specs, "c": ("BYTES", (None,))})
    answer = read_json(tf_serving.write_answer(True, described, outputs))
    rows = zip(outputs["a"].tolist(), outputs["b"].tolist(), strict=True)
    assert answer == {"predictions": [{"a": a, "b": b, "c": "text"} for a, b in rows]}


def test_long_texts_in_and_out():
    async def program():
        app = make_app(FakeService({("scale", 1): echo("BYTES")}))
        body = json.dumps({"instances": [["ab", "cd"]] * 100_000}).encode()
        status, text = await call(app, PREDICT, receiving(body))
        assert (status, json.loads(text)) == (200, {"predictions": [["ab", "cd"]] * 100_000})

    run(program)
