"""Runs a long command: its output goes to a log, a line on the screen shows that it lives."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hvdext.engine.errors import EngineError

_SECONDS_BETWEEN_LINES = 15.0  # where the screen is a file or a pipe, which only grows
_TAIL_LINES = 25
_ERROR_LINES = 8
_PERCENT = re.compile(rb"^\[ *(\d+)%\]", re.MULTILINE)  # as CMake's makefiles print it


def run_logged(command: Sequence[str], *, phase: str, log: Path, cwd: Path, env: dict[str, str]) -> None:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        phase: what the user is told is going on.
        log: the file to which stdout and stderr are appended.
        cwd: the folder to run in.
        env: the complete environment.

    Raises:
        EngineError: if the command fails; the message holds the errors and the end of the log.
    """
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        begin = out.tell()
        # A session of its own, so that an interrupted build takes its compilers along.
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        try:
            _wait(process, phase, log, begin)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        raise EngineError(
            f"{phase} failed with exit code {process.returncode}.\n{excerpt(log, begin)}\n"
            f"The full log is {log}"
        )


def excerpt(log: Path, begin: int = 0) -> str:
    """Returns the lines of a log that say what failed, and its last lines.

    A parallel build goes on for a while after an error, so the cause may be far above the end.

    Args:
        log: the file.
        begin: the byte to start from.
    """
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    errors = [line for line in lines[:-_TAIL_LINES] if "error:" in line.lower()][:_ERROR_LINES]
    if errors:
        errors.append("...")
    return "\n".join("  " + line for line in errors + lines[-_TAIL_LINES:])


def percent(output: bytes) -> int | None:
    """Returns the last percentage that CMake printed; None if there is none."""
    found = _PERCENT.findall(output)
    return int(found[-1]) if found else None


def _wait(process: subprocess.Popen, phase: str, log: Path, begin: int) -> None:
    screen = sys.stderr
    live = screen.isatty()
    start = last_line = time.monotonic()
    if not live:
        print(f"{phase} ...", file=screen, flush=True)
    while True:
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            pass
        else:
            break
        now = time.monotonic()
        if live or now - last_line >= _SECONDS_BETWEEN_LINES:
            _show(_status(phase, now - start, log, begin), live)
            last_line = now
    _show(f"{phase}: {time.monotonic() - start:.0f} s", live)
    if live:
        print(file=screen, flush=True)


def _status(phase: str, seconds: float, log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        done = percent(file.read())
    return f"{phase}: {seconds:.0f} s" + ("" if done is None else f", {done} %")


def _show(text: str, live: bool) -> None:
    if live:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)
