"""Starts ranks with horovodrun and waits for them, but never for ever."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.multiprocess.launching import fork_client, fork_server

_HERE = Path(__file__).parent
_WORKER = f"{__package__}.worker"
# The launcher as users start it, for one test; the others do without its ten seconds of asking what is built.
HOROVODRUN = [str(Path(sys.executable).parent / "horovodrun")]
_QUICK_HOROVODRUN = [sys.executable, str(_HERE / "quick_horovodrun.py")]
_TWO_HOSTS = _HERE.parents[2] / "benchmarks" / "two_hosts.py"
_SERVERS = "HVDEXT_TESTS_FORK_SERVERS"  # their folder; ranks that start processes use the same servers


@dataclass(frozen=True)
class Ended:
    """How a launch ended.

    Attributes:
        ranks: what each rank's program returned, as JSON gives it back; None for a rank without result.
        output: standard output and error of all ranks, as the launcher printed them.
        exit_code: the launcher's; None if it was killed at the deadline.
        seconds: from start to end.
    """

    ranks: list
    output: str
    exit_code: int | None
    seconds: float


@dataclass(frozen=True)
class Job:
    """A launch that runs.

    Attributes:
        process: the launcher.
        file: gets the output of all ranks.
    """

    process: subprocess.Popen
    file: Path

    @property
    def output(self) -> str:
        """What has been printed so far."""
        return self.file.read_text()


def launch(ranks: int, target: str, *, timeout: float, env: Mapping[str, str] | None = None) -> Ended:
    """Runs `module:function` of `tests.multiprocess` on each of `ranks` ranks.

    Args:
        ranks: how many.
        target: what to run; its results must be JSON, arrays excepted (they become lists).
        timeout: seconds, after which all processes of the launch are killed.
        env: environment variables on top of this process's.
    """
    return _run([*_python_on(ranks), "-m", _WORKER, target], ranks, timeout, env)


def launch_on_two_hosts(ranks: int, target: str, *, timeout: float) -> Ended:
    """Runs `module:function` on `ranks` ranks of each of two hosts, which are namespaces; see `launch`."""
    command = [sys.executable, str(_TWO_HOSTS), "--ranks", str(ranks)]
    return _run([*command, sys.executable, "-m", _WORKER, target], 2 * ranks, timeout, None)


def launch_script(
    ranks: int, script: Path, *arguments: str, timeout: float, launcher: list[str] = _QUICK_HOROVODRUN
) -> Ended:
    """Runs a Python script on each of `ranks` ranks.

    Args:
        ranks: how many.
        script: its file.
        *arguments: handed to the script.
        timeout: seconds, after which all processes of the launch are killed.
        launcher: the command that starts the ranks.
    """
    python = [sys.executable] if launcher == HOROVODRUN else None
    return _run([*_python_on(ranks, launcher, python), str(script), *arguments], ranks, timeout, None)


def launch_elastic(hosts: Path, script: Path, *arguments: str, timeout: float) -> Ended:
    """Runs a Python script on two ranks, one of which is enough to go on.

    Args:
        hosts: a file that the launcher reads once a second, with lines `host:slots`.
        script: its file.
        *arguments: handed to the script.
        timeout: seconds, after which all processes of the launch are killed.
    """
    discovery = hosts.with_name("discover.sh")
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    options = {
        "-np": 2,
        "--min-np": 1,
        "--max-np": 2,
        "--network-interface": "lo",
        "--host-discovery-script": discovery,
        "--elastic-timeout": 30,
        "--gloo-timeout-seconds": 30,  # a new rank takes some seconds to import TensorFlow
    }
    flags = [str(part) for option in options.items() for part in option]
    return _run([*_QUICK_HOROVODRUN, *flags, *forked_python(), str(script), *arguments], 2, timeout, None)


def run_python(program: str, *arguments: object, timeout: float, **options) -> subprocess.CompletedProcess:
    """Runs `python -c PROGRAM ARGUMENTS` in a process that has imported TensorFlow already.

    Args:
        program: its source.
        *arguments: handed to it.
        timeout: seconds, after which a `subprocess.TimeoutExpired` is raised.
        **options: of `subprocess.run`.
    """
    command = [*forked_python(), "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, **options)


def forked_python() -> list[str]:
    """The command for a Python that has imported TensorFlow already.

    The first call starts the servers that such processes are copies of; processes started later share them.
    """
    if _SERVERS not in os.environ:
        os.environ[_SERVERS] = _start_servers()
    return [sys.executable, "-IS", fork_client.__file__, os.environ[_SERVERS]]


@contextlib.contextmanager
def running(
    ranks: int, *arguments: str, timeout: float, env: Mapping[str, str] | None = None
) -> Iterator[Job]:
    """Runs `python ARGUMENTS` on each of `ranks` ranks while the context lasts.

    Args:
        ranks: how many.
        *arguments: for Python.
        timeout: seconds, after which all processes are killed, so that whoever talks to them fails.
        env: environment variables on top of this process's.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    with tempfile.NamedTemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*_python_on(ranks, python=[sys.executable]), *arguments],
            start_new_session=True,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        deadline = threading.Timer(timeout, _kill, [process])
        deadline.start()
        try:
            yield Job(process, Path(output.name))
        finally:
            deadline.cancel()
            _kill(process)


def _python_on(ranks, launcher=_QUICK_HOROVODRUN, python=None):
    python = python or forked_python()
    return [*launcher, "-np", str(ranks), *python] if ranks > 1 else python


def _start_servers():
    folder = tempfile.mkdtemp(prefix="hvdext-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for number in range(fork_client.SERVERS):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.join(folder, str(number)))
            listener.listen()
            server = subprocess.Popen(
                [sys.executable, "-m", fork_server.__name__, str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        atexit.register(server.communicate)  # the end of its input is its own
    return folder


def _run(command, ranks, timeout, env):
    # The engine looks once a millisecond whether there is something to do, a sixth of a core for each rank;
    # what arrives wakes it anyway.
    settings = {"HVDEXT_DEADLINE": "60", "OMP_NUM_THREADS": "1", "HOROVOD_CYCLE_TIME": "10"}
    environment = os.environ | settings | dict(env or {})
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "output"), "w+") as output:
        environment["TEST_RESULTS"] = folder
        start = time.monotonic()
        job = subprocess.Popen(
            command, start_new_session=True, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            exit_code = job.wait(timeout)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            _kill(job)
        seconds = time.monotonic() - start
        output.seek(0)
        return Ended([_result(folder, r) for r in range(ranks)], output.read(), exit_code, seconds)


def _result(folder, rank):
    file = Path(folder, f"{rank}.json")
    return json.loads(file.read_text()) if file.exists() else None


def _kill(job):
    """The launcher puts its ranks into process groups of their own, so descendants are killed one by one."""
    if job.poll() is not None:
        return
    family = psutil.Process(job.pid).children(recursive=True)
    os.killpg(job.pid, signal.SIGKILL)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    job.wait()
