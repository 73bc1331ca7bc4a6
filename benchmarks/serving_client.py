"""A light HTTP client of an inference server, and loads made of many: closed and open."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

TOLERANCE = 1e-4  # of an answer, relative to the largest value of an output


@dataclass
class Questions(ABC):
    """What is asked: rows to choose from, and what the model says of each.

    Attributes:
        rows: float32, shape (n, ...).
        answers: float32, shape (n, outputs), of plain Keras.
    """

    rows: np.ndarray
    answers: np.ndarray

    @property
    @abstractmethod
    def headers(self) -> str:
        """What HTTP says of a body."""

    @abstractmethod
    def body(self, number: int) -> bytes:
        """The request with this id, which chooses the row."""

    @abstractmethod
    def is_right(self, number: int, headers: dict[str, str], body: bytes) -> bool:
        """Whether this is the answer to request `number`."""

    def _agrees(self, number, found):
        expected = self.answers[number % len(self.answers)]
        if found.size != expected.size:
            return False
        return np.abs(found.ravel() - expected).max() <= TOLERANCE * np.abs(expected).max()


@dataclass
class BinaryQuestions(Questions):
    """Of a model that also gives back an id, in the protocol's binary form: no answer passes for another."""

    def __post_init__(self):
        self._bodies = [row.tobytes() for row in self.rows]
        inputs = [("id", "INT64", (1, 1), 8), ("x", "FP32", (1, *self.rows.shape[1:]), 4)]
        self._header = json.dumps(
            {
                "parameters": {"binary_data_output": True},
                "inputs": [
                    {
                        "name": name,
                        "datatype": datatype,
                        "shape": shape,
                        "parameters": {"binary_data_size": math.prod(shape) * size},
                    }
                    for name, datatype, shape, size in inputs
                ],
            }
        ).encode()

    @property
    def headers(self) -> str:
        return (
            "Content-Type: application/octet-stream\r\n"
            f"Inference-Header-Content-Length: {len(self._header)}\r\n"
        )

    def body(self, number: int) -> bytes:
        return self._header + number.to_bytes(8, "little") + self._bodies[number % len(self._bodies)]

    def is_right(self, number: int, headers: dict[str, str], body: bytes) -> bool:
        outputs = _outputs(headers, body)
        return outputs["id"].tolist() == [[number]] and self._agrees(number, outputs["y"])


@dataclass
class JsonQuestions(Questions):
    """Of a model with one input and one output, in JSON."""

    def __post_init__(self):
        described = {"name": "x", "datatype": "FP32", "shape": (1, *self.rows.shape[1:])}
        self._bodies = [
            json.dumps({"inputs": [described | {"data": row.round(4).ravel().tolist()}]}).encode()
            for row in self.rows
        ]

    @property
    def headers(self) -> str:
        return "Content-Type: application/json\r\n"

    def body(self, number: int) -> bytes:
        return self._bodies[number % len(self._bodies)]

    def is_right(self, number: int, headers: dict[str, str], body: bytes) -> bool:
        return self._agrees(number, np.asarray(json.loads(body)["outputs"][0]["data"], "float32"))


@dataclass
class Outcome:
    """What became of the requests of one load.

    Attributes:
        seconds: how long it lasted, to the last answer.
        sending: until the last request was sent.
        statuses: how many requests ended with each HTTP status; 0: without an answer.
        wrong: ids of those with status 200 whose answer was another request's, or wrong.
        unhelpful: refusals without `Retry-After`.
        latencies: seconds of those with status 200.
    """

    seconds: float = 0.0
    sending: float = 0.0
    statuses: Counter = field(default_factory=Counter)
    wrong: list[int] = field(default_factory=list)
    unhelpful: int = 0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return (self.statuses[200] - len(self.wrong)) / self.seconds

    def add(self, other: Outcome) -> None:
        """Adds what came of another load of the same kind."""
        self.seconds += other.seconds
        self.sending += other.sending
        self.statuses += other.statuses
        self.wrong += other.wrong
        self.unhelpful += other.unhelpful
        self.latencies += other.latencies

    def milliseconds(self, percent: float) -> float:
        """A percentile of the latency."""
        return 1000 * float(np.percentile(self.latencies, percent)) if self.latencies else float("nan")


class Connection:
    """One kept-alive connection: a request, its answer, the next request.

    An answer that came twice would be taken for that of the next request, and have a wrong id.
    """

    def __init__(self, port: int, path: str, questions: Questions):
        self._port, self._questions = port, questions
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{questions.headers}Content-Length: "
        ).encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, number: int, outcome: Outcome) -> None:
        """Sends request `number` and notes what becomes of it."""
        begin = time.perf_counter()
        try:
            status, headers, body = await self._exchange(self._questions.body(number))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            outcome.statuses[0] += 1
            return
        outcome.statuses[status] += 1
        if status == 200:
            outcome.latencies.append(time.perf_counter() - begin)
            if not self._questions.is_right(number, headers, body):
                outcome.wrong.append(number)
        elif "retry-after" not in headers:
            outcome.unhelpful += 1

    def close(self) -> None:
        """Closes it; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _exchange(self, body):
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(self._head + str(len(body)).encode() + b"\r\n\r\n" + body)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            self.close()
        return int(first.split()[1]), headers, answer


def _outputs(headers, body) -> dict[str, np.ndarray]:
    length = int(headers["inference-header-content-length"])
    outputs, place = {}, length
    for output in json.loads(body[:length])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        dtype = {"INT64": "<i8", "FP32": "<f4"}[output["datatype"]]
        outputs[output["name"]] = np.frombuffer(body[place : place + size], dtype).reshape(output["shape"])
        place += size
    return outputs


async def closed_load(connections: list[Connection], seconds: float, first: int) -> Outcome:
    """Each connection sends its next request when it has the answer to the one before.

    Args:
        connections: one for each client.
        seconds: how long new requests are sent.
        first: the first id; each request has one of its own.
    """
    numbers, outcome = itertools.count(first), Outcome()
    begin = time.perf_counter()

    async def client(connection):
        while time.perf_counter() < begin + seconds:
            outcome.sending = time.perf_counter() - begin
            await connection.ask(next(numbers), outcome)

    await asyncio.gather(*map(client, connections))
    outcome.seconds = time.perf_counter() - begin
    return outcome


async def open_load(connections: list[Connection], seconds: float, first: int, rate: float) -> Outcome:
    """Requests are sent at a fixed rate, whatever becomes of those before.

    Args:
        connections: enough for all requests that are under way at a time.
        seconds: how long new requests are sent.
        first: the first id.
        rate: requests per second.
    """
    numbers, outcome = itertools.count(), Outcome()
    begin = time.perf_counter()

    async def client(connection):
        while (number := next(numbers)) < rate * seconds:
            await asyncio.sleep(begin + number / rate - time.perf_counter())
            outcome.sending = time.perf_counter() - begin
            await connection.ask(first + number, outcome)

    await asyncio.gather(*map(client, connections))
    outcome.seconds = time.perf_counter() - begin
    return outcome
