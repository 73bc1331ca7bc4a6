"""Runs a program that measures, reads what it has found; what such programs share."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = "HVDEXT_BENCH_FIGURES"  # the file to which programs of a suite append what they have found


def result_of(command, deadline, env=None):
    """Runs `command` with one argument more, the file for its result; returns the JSON that it leaves there.

    Args:
        command: program and arguments.
        deadline: seconds.
        env: variables on top of this process's.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        finished = subprocess.run(
            [*command, str(result)],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""} | (env or {}),
            timeout=deadline,
            capture_output=True,
            text=True,
        )
        if finished.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{finished.stdout}{finished.stderr}")
        return json.loads(result.read_text())


def horovodrun(ranks, *options, python=sys.executable):
    """The command that starts Python on so many ranks, but for its script.

    Args:
        ranks: how many.
        *options: of horovodrun.
        python: the interpreter of the environment whose horovodrun it is.
    """
    return [str(Path(python).with_name("horovodrun")), "-np", str(ranks), *options, str(python)]


def worker_parser():
    """Takes what programs that measure in rounds hand to the workers that they start."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return parser


def print_load():
    """Says how busy the machine was."""
    print(f"load average over the last minute: {os.getloadavg()[0]:.1f}")


def figure(what, values, unit, digits=3):
    """Prints the median of `values`, with the lowest and the highest; a suite gets all of them.

    Args:
        what: what is measured, and how.
        values: measurements, in `unit`.
        unit: "ms", "images/s", "ratio" and the like.
        digits: after the point.

    Returns:
        The median.
    """
    values = list(values)
    middle = statistics.median(values)
    spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}, {len(values)} measurements"
    print(f"{what}: {middle:.{digits}f} {unit} ({spread})", flush=True)
    if FIGURES in os.environ:
        with open(os.environ[FIGURES], "a") as file:
            file.write(json.dumps({"what": what, "unit": unit, "median": middle, "values": values}) + "\n")
    return middle


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


def bytes_sent(*devices):
    """What has left this network namespace by the first of `devices` that it has; 0 if it has none."""
    sent = {}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, counters = line.partition(":")
        sent[name.strip()] = int(counters.split()[8])
    return next((sent[device] for device in devices if device in sent), 0)


def peak_resident():
    """The most memory that this process has held so far, in bytes."""
    return _memory("VmHWM")


def resident():
    """The memory that this process holds now, in bytes."""
    return _memory("VmRSS")


def _memory(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if field in line]
    return int(line.split()[1]) * 1024
