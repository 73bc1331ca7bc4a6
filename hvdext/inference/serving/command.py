"""`hvdext serve`: what each rank does.

Rank 0 is the front (`front.py`); the others supervise a worker. Rank 0 supervises one, too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from hvdext.inference.serving.options import TOKEN, Job, ServeError, check, where_front_listens

if TYPE_CHECKING:
    from hvdext.inference.serving.supervisor import Front, Supervisor

_PACKAGES = ("starlette", "uvicorn", "httptools", "uvloop", "orjson", "prometheus_client")
_END_SECONDS = 10.0  # that the front may take to end after it has drained
SCOPE = "hvdext-serve"  # on the launcher's store, which is the job's own


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
    from hvdext.inference.serving.front import lead

    return lead(job)


def make_supervisor(job: Job, look_for_front: Callable[[], Front | None]) -> Supervisor:
    """The supervisor of this rank."""
    from hvdext.inference.serving.supervisor import Supervisor
    from hvdext.inference.serving.worker import Post

    post = Post(
        rank=job.where.rank,
        size=job.where.size,
        addresses=(),
        token="",
        pipeline=job.settings.mode == "pipeline",
    )
    worker = {
        "threads": job.threads,
        "local_rank": job.where.local_rank,
        "modules": job.args.modules,
    }
    end_seconds = job.args.drain_seconds + _END_SECONDS
    return Supervisor(post, look_for_front, worker, job.args.start_timeout, end_seconds)


def _follow(job: Job) -> int:
    from hvdext.inference.serving.supervisor import FrontMissing

    supervisor = make_supervisor(job, _looker(job))
    rank = job.where.rank
    for number in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(number).name
        signal.signal(number, lambda *_, name=name: supervisor.ask_to_end(f"rank {rank} got {name}"))
    try:
        supervisor.run()
    except FrontMissing as error:
        raise ServeError(error) from error
    return 0


def _looker(job):
    """Looks where the front is: at --coordinator, or on the launcher's store."""
    from hvdext.comm.kv_store import KeyValueStore
    from hvdext.inference.serving.supervisor import Front, FrontMissing

    address = where_front_listens(job.args)

    def look() -> Front | None:
        if address is not None:
            return Front((address,), os.environ[TOKEN])
        text = KeyValueStore(job.where.kv_store, SCOPE).read("front")
        if text is None:
            return None
        note = json.loads(text)
        if "error" in note:
            raise FrontMissing(note["error"])
        return Front(tuple((host, port) for host, port in note["addresses"]), note["token"])

    return look
