"""A running `hvdext serve` under load: are all answers right, what is batching worth, does overload do harm?

    python benchmarks/serving.py                  # 60 s of each, 2 ranks, 8 clients: about four minutes
    python benchmarks/serving.py --seconds 20

The model is a recurrent one, a GRU of 512 units over 64 steps: each step waits for the one before, and costs
for four rows little more than for one. Each request has one row and an id of its own, which the model gives
back; the other output must be what plain Keras says of that row. Each rank has one thread.

- Batching: 8 clients, each with one request under way, on two servers that run side by side and are used in
  turn: one with dynamic batching, one with --max-batch-size 1. An idle server takes no time from the other.
- Overload: requests come at five times the rate that the server without batching has reached, whatever
  becomes of them. (With batching a server gains speed as its queue grows; this one's capacity is known.) Only
  200 and 503 may come back, every 200 right, and the front's memory must not grow.

The clients are coroutines of this one process. Its share of a core is printed, since where cores are few they
take from the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
from serving_client import BinaryQuestions, Connection, Outcome, Questions, closed_load, open_load

STEPS, FEATURES, UNITS, OUTPUTS = 64, 16, 512, 16
START_SECONDS, STOP_SECONDS = 120, 60
OVERLOAD = 5  # times the rate that was reached
QUEUE = 64  # requests; the overloaded server's limit
SLICE_SECONDS = 5  # of one server's turn
MEBIBYTE = 2**20
QUIET = {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}  # for TensorFlow


def main():
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recurrent.keras"
        questions = make_model(path)
        with contextlib.ExitStack() as stack:
            queue = ["--max-queue", str(QUEUE)]
            batching = stack.enter_context(Server(path, options.ranks, queue))
            single = stack.enter_context(Server(path, options.ranks, [*queue, "--max-batch-size", "1"]))
            rate = compare(batching, single, questions, options)
            overload(single, questions, rate, options)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="of load on each server, and of overload")
    parser.add_argument("--connections", type=int, default=256, help="of the clients in overload")
    return parser.parse_args()


def make_model(path: Path) -> BinaryQuestions:
    """Writes the model; returns what to ask it."""
    os.environ.update(QUIET)
    import keras

    keras.utils.set_random_seed(0)
    number = keras.Input((1,), dtype="int64", name="id")
    row = keras.Input((STEPS, FEATURES), name="x")
    state = keras.layers.GRU(UNITS)(row)
    outputs = {"id": keras.layers.Identity(dtype="int64")(number), "y": keras.layers.Dense(OUTPUTS)(state)}
    model = keras.Model({"id": number, "x": row}, outputs)
    model.save(path)
    rows = np.random.default_rng(0).normal(size=(64, STEPS, FEATURES)).astype("float32")
    ids = np.zeros((len(rows), 1), "int64")
    return BinaryQuestions(rows, model.predict({"id": ids, "x": rows}, verbose=0)["y"])


def compare(batching: Server, single: Server, questions: Questions, options) -> float:
    """The same closed load on both servers in turn; returns the requests per second without batching."""
    servers = {"batching": batching, "one by one": single}
    totals = {name: Outcome() for name in servers}
    used = psutil.Process().cpu_times()
    begin, first = time.perf_counter(), 0
    for turn in range(max(1, round(options.seconds / SLICE_SECONDS))):
        order = list(servers) if turn % 2 else list(servers)[::-1]
        for name in order:
            connections = servers[name].connections(options.clients, questions)
            totals[name].add(asyncio.run(closed(connections, SLICE_SECONDS, first)))
            first += 10**9
    share = seconds_since(used) / (time.perf_counter() - begin)
    for name, outcome in totals.items():
        must_be_right(outcome, {200})
        answered = servers[name].count(200)
        if answered != outcome.statuses[200]:
            sys.exit(f"{name}: the server says {answered} answers, the clients {outcome.statuses[200]}.")
        print(
            f"{name:10s} {outcome.statuses[200]:6d} requests, all answered right: {outcome.rate:6.1f}/s; "
            f"latency {_percentiles(outcome)}"
        )
    one, many = totals["one by one"], totals["batching"]
    print(
        f"batching: {many.rate / one.rate:.2f} times the throughput, p95 "
        f"{many.milliseconds(95) / one.milliseconds(95):.2f} times; the clients took {share:.0%} of a core"
    )
    return one.rate


def overload(server: Server, questions: Questions, capacity: float, options) -> None:
    """More requests than the server can answer.

    Args:
        server: who is asked.
        questions: what.
        capacity: requests per second that it can answer.
        options: the command line's.
    """
    connections = server.connections(options.connections, questions)
    used = psutil.Process().cpu_times()
    outcome, memory = asyncio.run(_flooded(server, connections, options.seconds, OVERLOAD * capacity))
    must_be_right(outcome, {200, 503})
    if outcome.unhelpful:
        sys.exit(f"{outcome.unhelpful} refusals had no Retry-After.")
    sent = outcome.statuses.total()
    share = seconds_since(used) / outcome.seconds
    print(
        f"overload, {sent / outcome.sending / capacity:.1f} times what it can answer, for "
        f"{outcome.sending:.0f} s: {sent} requests, {outcome.statuses[200]} answered right "
        f"({outcome.rate:.1f}/s; latency {_percentiles(outcome)}), {outcome.statuses[503]} refused with 503 "
        "and Retry-After, nothing else"
    )
    half = len(memory) // 2
    print(
        f"memory of the front: {memory[0] / MEBIBYTE:.0f} MiB before, at most "
        f"{max(memory[:half]) / MEBIBYTE:.0f} in the first half, {max(memory[half:]) / MEBIBYTE:.0f} in the "
        f"second; the clients took {share:.0%} of a core"
    )


def must_be_right(outcome: Outcome, allowed: set[int]) -> None:
    """Ends the program if a request was lost, or answered with anything else than its own answer."""
    if outcome.wrong:
        sys.exit(f"{len(outcome.wrong)} answers were wrong: requests {outcome.wrong[:10]}.")
    if set(outcome.statuses) - allowed:
        sys.exit(f"Only {sorted(allowed)} may come back. Received: {dict(outcome.statuses)}; 0: no answer.")


class Server:
    """`hvdext serve` under horovodrun; a context that ends with it drained.

    Args:
        model: what it serves.
        ranks: how many.
        arguments: of the command.
    """

    def __init__(self, model: Path, ranks: int, arguments: list[str]):
        self._name = model.stem
        self._port = free_port()
        threads = {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the server
        self._process = subprocess.Popen(
            [*self._command(model, ranks), *arguments],
            env=os.environ | threads | QUIET,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _command(self, model: Path, ranks: int) -> list[str]:
        launcher = str(Path(sys.executable).with_name("horovodrun"))
        return [launcher, "-np", str(ranks), "hvdext", "serve", str(model), "--port", str(self._port)]

    def __enter__(self) -> Server:
        end = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                self._log.seek(0)
                sys.exit(f"The server has not become ready:\n{self._log.read()}")
            time.sleep(0.2)
        return self

    def __exit__(self, *exc_info) -> None:
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def connections(self, count: int, questions: Questions) -> list[Connection]:
        """New connections of clients."""
        path = f"/v2/models/{self._name}/infer"
        return [Connection(self._port, path, questions) for _ in range(count)]

    def count(self, status: int) -> int:
        """How many requests to the model the server says it has answered with this status."""
        lines = re.findall(r"^hvdext_requests_total\{(.*)\} (\S+)$", self._get("/metrics"), re.MULTILINE)
        wanted = (f'model="{self._name}"', f'status="{status}"')
        return int(sum(float(n) for labels, n in lines if all(label in labels for label in wanted)))

    def front(self) -> psutil.Process:
        """The process that listens."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                for held in process.net_connections("tcp"):
                    if held.status == psutil.CONN_LISTEN and held.laddr.port == self._port:
                        return process
        raise RuntimeError(f"No process of the server listens at port {self._port}.")

    def _is_ready(self):
        try:
            self._get("/v2/health/ready")
        except OSError:
            return False
        return True

    def _get(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as answer:
            return answer.read().decode()


async def closed(connections, seconds, first):
    outcome = await closed_load(connections, seconds, first)
    for connection in connections:
        connection.close()
    return outcome


async def _flooded(server, connections, seconds, rate):
    """The load's outcome, and the front's resident bytes meanwhile."""
    front, memory = server.front(), []

    async def watch():
        for _ in itertools.count():
            memory.append(front.memory_info().rss)
            await asyncio.sleep(0.5)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    outcome = await open_load(connections, seconds, 10**15, rate)
    watcher.cancel()
    for connection in connections:
        connection.close()
    return outcome, memory


def _percentiles(outcome):
    return ", ".join(f"p{p} {outcome.milliseconds(p):.0f} ms" for p in (50, 95, 99))


def seconds_since(before):
    now = psutil.Process().cpu_times()
    return now.user + now.system - before.user - before.system


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


if __name__ == "__main__":
    main()
