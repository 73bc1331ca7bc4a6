"""Runs a program that measures, reads what it has found; what such programs share."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


def result_of(command, deadline):
    """Runs `command` with one argument more, the file for its result; returns the JSON that it leaves there.

    Args:
        command: program and arguments.
        deadline: seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        finished = subprocess.run(
            [*command, str(result)],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""},
            timeout=deadline,
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{finished.stdout}{finished.stderr}")
        return json.loads(result.read_text())


def take_core(number, ranks):
    """Keeps this process, all its threads, on one core, if there is one for each rank of this host.

    Args:
        number: this rank's on this host.
        ranks: how many there are on it.
    """
    cores = sorted(os.sched_getaffinity(0))
    if number < len(cores) >= ranks:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), {cores[number]})


def peak_resident():
    """The most memory that this process has held so far, in bytes."""
    return _memory("VmHWM")


def resident():
    """The memory that this process holds now, in bytes."""
    return _memory("VmRSS")


def _memory(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if field in line]
    return int(line.split()[1]) * 1024
