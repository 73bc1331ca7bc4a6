"""Looks at TensorFlow, Keras and Horovod by importing them, in a process of its own.

A library built for another version may crash the interpreter that loads it, so the process that
asks is not the one that looks.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from hvdext.common.wording import describe

_MARK = "hvdext-inspection "
_DEADLINE = 120  # seconds; a cold disk may take half a minute to import TensorFlow
_TAIL_LINES = 5
# What may be compiled into Horovod, in the order it is shown.
_PARTS = ("gloo", "mpi", "nccl", "cuda", "rocm", "ccl", "ddl")


def inspect() -> dict[str, dict[str, Any]]:
    """Returns what can be imported, by package.

    Returns:
        For each of `tensorflow`, `keras` and `horovod` either `version` and, for Keras, `backend`
        or, for Horovod, `built` (names of controllers and transports), or `error`.
    """
    command = [sys.executable, "-m", "hvdext.engine.inspection"]
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, timeout=_DEADLINE, check=False
        )
    except subprocess.TimeoutExpired:
        return _everywhere(f"not known: importing took more than {_DEADLINE} s")
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    last = " | ".join(done.stderr.strip().splitlines()[-_TAIL_LINES:])
    return _everywhere(f"not known: importing ended with exit code {done.returncode}: {last}")


def _everywhere(error: str) -> dict[str, dict[str, Any]]:
    return {name: {"error": error} for name in ("tensorflow", "keras", "horovod")}


def _look_at_tensorflow() -> dict[str, Any]:
    return {"version": importlib.import_module("tensorflow").__version__}


def _look_at_keras() -> dict[str, Any]:
    keras = importlib.import_module("keras")
    # Keras 2 has no such function; its version says enough.
    backend = keras.config.backend() if hasattr(keras, "config") else "tensorflow"
    return {"version": keras.__version__, "backend": backend}


def _look_at_horovod() -> dict[str, Any]:
    version = importlib.import_module("horovod").__version__
    engine = importlib.import_module("horovod.tensorflow")
    built = [part for part in _PARTS if getattr(engine, f"{part}_built")()]
    return {"version": version, "built": built}


def _attempt(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return look()
    except Exception as error:  # whatever a broken package raises is the answer
        return {"error": describe(error)}


def _main() -> None:
    found = {
        "tensorflow": _attempt(_look_at_tensorflow),
        "keras": _attempt(_look_at_keras),
        "horovod": _attempt(_look_at_horovod),
    }
    print(_MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    _main()
