"""What each rank of a run of Horovod's tests does: pytest, in step with the other ranks.

A test that fails on one rank, or hangs, must not leave the others in a collective that nobody else enters:
the ranks meet after each test, by files and not by the engine, and end together where one does not come.
Whoever has started them starts them again with what is left.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

SECONDS = 600  # for one test: in a session the graph grows with each call
LEFT_BEHIND = 3  # how a rank ends that another has not met


class InStep:
    """Writes what became of each test, and waits for the other ranks before the next.

    Args:
        folder: where each rank writes a file.
        rank: this one.
        size: how many there are.
        skipped: names of tests that are not to be run.
    """

    def __init__(self, folder: Path, rank: int, size: int, skipped: set[str]):
        self._files = [folder / f"rank{i}.jsonl" for i in range(size)]
        self._mine = self._files[rank]
        self._skipped = skipped
        self._answer: dict = {}
        self._clock: threading.Timer | None = None

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if name_of(item.nodeid) not in self._skipped]

    def pytest_runtest_logstart(self, nodeid):
        self._answer = {"test": name_of(nodeid), "outcome": "passed", "text": ""}
        self._clock = threading.Timer(SECONDS, os._exit, [LEFT_BEHIND])
        self._clock.daemon = True
        self._clock.start()

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self._answer["outcome"] = report.outcome
            self._answer["text"] += str(report.longrepr)

    def pytest_runtest_logfinish(self, nodeid):
        self._clock.cancel()
        with self._mine.open("a") as file:
            file.write(json.dumps(self._answer) + "\n")
        until = time.monotonic() + SECONDS
        while not all(name_of(nodeid) in told(file) for file in self._files):
            if time.monotonic() > until:
                os._exit(LEFT_BEHIND)
            time.sleep(0.01)


def name_of(nodeid: str) -> str:
    """`test_tensorflow.py::test_name` of pytest's name for a test."""
    path, *_, test = nodeid.split("::")
    return f"{Path(path).name}::{test}"


def told(file: Path) -> dict[str, dict]:
    """What a rank has written so far: its answers by test."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    answers = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
    return {answer["test"]: answer for answer in answers}


def main(test_file: str, folder: str, skipped: str) -> int:
    """Runs one file of tests on this rank; see `InStep`."""
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    plugin = InStep(Path(folder), rank, size, set(json.loads(Path(skipped).read_text())))
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-c", os.devnull]
    # A failure is an answer, no reason for the launcher to end the other rank.
    return min(pytest.main([*options, f"--rootdir={Path(test_file).parent}", test_file], [plugin]), 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    sys.exit(main(*sys.argv[1:]))
