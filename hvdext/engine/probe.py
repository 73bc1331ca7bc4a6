"""A real allreduce of two ranks under a launcher, with a deadline.

The module is both sides: `two_rank_allreduce` starts it twice through horovodrun, and each rank
runs `_rank`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from hvdext.engine.shared_memory import shared_memory

_MARK = "hvdext-probe "
_RANKS = 2
_EXPECTED = [3.0, 30.0]  # rank r gives (r + 1) * [1, 10]
_TAIL_LINES = 8


@dataclass(frozen=True)
class ProbeResult:
    """How the allreduce went.

    Attributes:
        ok: whether both ranks arrived and the sum was right.
        seconds: from the start of horovodrun to its end.
        detail: the sum, or what went wrong.
    """

    ok: bool
    seconds: float
    detail: str


def two_rank_allreduce(controller: str, deadline: float = 120.0) -> ProbeResult:
    """Sums a vector over two ranks on this machine.

    Args:
        controller: what brings the ranks together: "gloo", which horovodrun does by itself, or "mpi", for
            which it calls mpirun.
        deadline: seconds after which the ranks are ended.
    """
    # The module and not the script `horovodrun`: the script on PATH may be another interpreter's.
    launcher = [sys.executable, "-m", "horovod.runner.launch", f"--{controller}", "-np", str(_RANKS)]
    worker = [sys.executable, "-m", "hvdext.engine.probe", str(deadline)]
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    start = time.monotonic()
    job = subprocess.Popen(
        launcher + worker,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )
    try:
        output, _ = job.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        _end(job)
        return ProbeResult(False, time.monotonic() - start, f"no result within {deadline:.0f} s")
    return read_result(output, job.returncode, time.monotonic() - start)


def read_result(output: str, exit_code: int, seconds: float) -> ProbeResult:
    """Judges the output of horovodrun.

    Args:
        output: stdout and stderr of all ranks.
        exit_code: of horovodrun.
        seconds: how long it ran.
    """
    for line in output.splitlines():
        _, mark, text = line.partition(_MARK)  # horovodrun puts the rank in front
        if mark and exit_code == 0:
            found, _ = json.JSONDecoder().raw_decode(text)  # mpirun may put the next line's rank behind
            shared = found.pop("shared memory", "not told")
            ok = found == {"size": _RANKS, "sum": _EXPECTED}
            wrong = "" if ok else f"; expected size {_RANKS} and sum {_EXPECTED}"
            told = f"size {found['size']}, sum {found['sum']}{wrong}; shared memory {shared}"
            return ProbeResult(ok, seconds, told)
    last = "\n".join(output.strip().splitlines()[-_TAIL_LINES:])
    return ProbeResult(False, seconds, f"horovodrun ended with exit code {exit_code}:\n{last}")


def _end(job: subprocess.Popen) -> None:
    """Asks horovodrun to end its ranks, which it started in groups of their own, then insists."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.communicate(timeout=10)
            return


def _rank(deadline: float) -> None:
    # Bounds the life of a rank whose launcher was killed.
    faulthandler.dump_traceback_later(deadline, exit=True)
    import horovod.tensorflow as horovod
    import tensorflow as tf

    horovod.init()
    mine = tf.constant([1.0, 10.0]) * (horovod.rank() + 1.0)
    total = horovod.allreduce(mine, op=horovod.Sum, name="hvdext/probe")
    if horovod.rank() == 0:
        found = {"size": horovod.size(), "sum": total.numpy().tolist(), "shared memory": shared_memory()}
        print(_MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    _rank(float(sys.argv[1]))
