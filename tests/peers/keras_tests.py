"""Keras' own tests of its optimizers, plain and with each optimizer distributed over one rank:

    python -m tests.peers.keras_tests [pytest's arguments]

Fails if a test passes plain and not so, but for those in `_CANNOT_PASS`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import keras
import pytest

import hvdext as hvd

_FOLDER = Path(keras.__file__).parent / "src" / "optimizers"
_CANNOT_PASS: dict[str, str] = {}  # test: reason
_made: list[str] = []  # the classes of the optimizers that have been distributed
# These hold others, each distributed already.
_HOLDERS = (keras.optimizers.LossScaleOptimizer,)


class Outcomes:
    """What has become of each test: pytest's plugin."""

    def __init__(self) -> None:
        self.by_test: dict[str, str] = {}
        self.texts: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("/")[-1]
        if report.when == "call" or report.outcome != "passed":
            self.by_test[name] = report.outcome
            self.texts[name] = str(report.longrepr)


@contextlib.contextmanager
def distributed():
    """Within it, whatever makes an optimizer of Keras gets a distributed one."""
    classes = [
        value
        for value in vars(keras.optimizers).values()
        if isinstance(value, type)
        and issubclass(value, keras.optimizers.Optimizer)
        and "__init__" in vars(value)
    ]
    plain = {cls: cls.__init__ for cls in set(classes) if not issubclass(cls, _HOLDERS)}
    for cls, init in plain.items():
        cls.__init__ = _distributing(init)
    try:
        yield
    finally:
        for cls, init in plain.items():
            cls.__init__ = init


def _distributing(init):
    @functools.wraps(init)
    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if type(self).__init__ is made and not hasattr(
            self, "optimizers"
        ):  # else a class around it is at work
            hvd.DistributedOptimizer(self)
            _made.append(type(self).__name__)

    return made


def run(arguments: list[str]) -> Outcomes:
    """Runs the tests in this process."""
    outcomes = Outcomes()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-c", os.devnull]
        pytest.main([*options, f"--rootdir={folder}", *map(str, _files()), *arguments], [outcomes])
    return outcomes


def _files():
    return sorted(_FOLDER.glob("*_test.py"))


def main(arguments: list[str]) -> int:
    """Runs the tests both ways and compares; returns 0 if as many pass as plain."""
    plain = run(arguments)
    hvd.init()
    with distributed():
        ours = run(arguments)
    passed = {test for test, outcome in plain.by_test.items() if outcome == "passed"}
    lost = {test for test in passed if ours.by_test.get(test) != "passed"}
    for test in sorted(lost - set(_CANNOT_PASS)):
        print(f"FAILED {test}\n{ours.texts.get(test, 'not run')[-3000:]}\n")
    surprises = sorted(test for test in _CANNOT_PASS if test in passed and test not in lost)
    for test in surprises:
        print(f"ON THE LIST, BUT PASSED: {test}")
    print(
        f"{len(passed)} of {len(plain.by_test)} tests pass plain, {len(passed - lost)} of these with "
        f"{len(_made)} distributed optimizers of {len(set(_made))} classes"
    )
    return int(not _made or bool(lost - set(_CANNOT_PASS) or surprises))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
