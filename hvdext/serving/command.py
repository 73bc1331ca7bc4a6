"""`hvdext serve`: what each rank does.

Rank 0 is the front (`front.py`); the others supervise a worker. Rank 0 supervises one, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal

from hvdext.serving.meeting import looker, make_supervisor
from hvdext.serving.options import Job, ServeError, check

_PACKAGES = ("starlette", "uvicorn", "httptools", "uvloop", "orjson", "prometheus_client")


def run(args: argparse.Namespace) -> int:
    """Serves until a signal ends it; returns the exit code.

    Raises:
        ServeError: on every rank alike, if an argument breaks its rule or rank 0 cannot start.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ServeError(f"{', '.join(missing)} is missing. Install it: pip install 'hvdext[serve]'")
    job = check(args, os.environ)
    if job.where.rank:
        return _follow(job)
    from hvdext.serving.front import lead

    return lead(job)


def _follow(job: Job) -> int:
    from hvdext.serving.supervisor import FrontMissing

    supervisor = make_supervisor(job, looker(job))
    rank = job.where.rank
    for number in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(number).name
        signal.signal(number, lambda *_, name=name: supervisor.ask_to_end(f"rank {rank} got {name}"))
    try:
        supervisor.run()
    except FrontMissing as error:
        raise ServeError(error) from error
    return 0
