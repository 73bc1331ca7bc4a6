"""What a second rank is worth to `hvdext serve`, and what its first costs beside a plain server.

    python benchmarks/serving_ranks.py                 # about three minutes
    python benchmarks/serving_ranks.py --clients 16

Two models: the recurrent one of serving.py, asked in the binary form, and a CNN of 420,042 parameters, asked
in JSON. Servers of one and of two ranks, for the CNN also a plain one behind uvicorn (plain_server.py), run
side by side and are used in turn by the same clients; an idle server takes no time from the others. Every
answer is checked against plain Keras. Each rank has one thread. The clients are coroutines of this process;
its share of a core is printed, since where cores are few they take from the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from measuring import figure, print_load
from serving import QUIET, Server, closed, make_model, must_be_right, seconds_since
from serving_client import JsonQuestions, Questions

HERE = Path(__file__).resolve().parent


def main():
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        for title, make in {"recurrent": make_model, "CNN in JSON": make_cnn}.items():
            path = Path(folder) / f"{title.split()[0].lower()}.keras"
            questions = make(path)
            with contextlib.ExitStack() as stack:
                servers = {f"{n} rank{'s' * (n > 1)}": Server(path, n, []) for n in (1, 2)}
                if isinstance(questions, JsonQuestions):
                    servers["plain"] = PlainServer(path, 1, [])
                for server in servers.values():
                    stack.enter_context(server)
                compare(title, servers, questions, options)
    print_load()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of load on each server in a round")
    return parser.parse_args()


def make_cnn(path: Path) -> JsonQuestions:
    """Writes the model; returns what to ask it."""
    os.environ.update(QUIET)
    import keras
    import models

    keras.utils.set_random_seed(0)
    row = keras.Input((28, 28, 1), name="x")
    model = keras.Model(row, models.cnn()(row))
    model.save(path)
    rows = np.random.default_rng(0).random((64, 28, 28, 1)).astype("float32").round(4)
    return JsonQuestions(rows, model.predict(rows, verbose=0))


def compare(title: str, servers: dict[str, Server], questions: Questions, options) -> None:
    """Answers per second of each server, and ratios within the same round."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    first, used, begin = 0, psutil.Process().cpu_times(), time.perf_counter()
    for turn in range(options.rounds + 1):  # the first warms up
        for name in list(servers)[:: 1 if turn % 2 else -1]:
            connections = servers[name].connections(options.clients, questions)
            outcome = asyncio.run(closed(connections, options.seconds, first))
            must_be_right(outcome, {200})
            first += 10**9
            if turn > 0:
                rates[name].append(outcome.rate)
    share = seconds_since(used) / (time.perf_counter() - begin)
    for name, found in rates.items():
        figure(f"{title}, {name}", found, "answers/s", 1)
    for name, base in (("2 ranks", "1 rank"), ("1 rank", "plain"), ("2 ranks", "plain")):
        if base in rates:
            each = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
            figure(f"{title}, {name} over {base}", each, "ratio")
    print(f"{title}: the clients took {share:.0%} of a core")


class PlainServer(Server):
    """As `Server`, but not hvdext's."""

    def _command(self, model: Path, ranks: int) -> list[str]:
        return [sys.executable, str(HERE / "plain_server.py"), str(model), str(self._port)]


if __name__ == "__main__":
    main()
