"""Where the ranks of a service and its front find each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from hvdext.comm.kv_store import KeyValueStore
from hvdext.serving.options import TOKEN, Job, where_front_listens
from hvdext.serving.supervisor import Front, FrontMissing, Supervisor
from hvdext.serving.worker.worker import Post

_END_SECONDS = 10.0  # that the front may take to end after it has drained
SCOPE = "hvdext-serve"  # on the launcher's store, which is the job's own


def make_supervisor(job: Job, look_for_front: Callable[[], Front | None]) -> Supervisor:
    """The supervisor of this rank."""
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


def looker(job: Job) -> Callable[[], Front | None]:
    """Looks where the front is: at --coordinator, or on the launcher's store."""
    address = where_front_listens(job.args)
    kv_store = job.where.kv_store

    def look() -> Front | None:
        if address is not None:
            return Front((address,), os.environ[TOKEN])
        assert kv_store is not None, "options.check has seen to it"
        text = KeyValueStore(kv_store, SCOPE).read("front")
        if text is None:
            return None
        note = json.loads(text)
        if "error" in note:
            raise FrontMissing(note["error"])
        return Front(tuple((host, port) for host, port in note["addresses"]), note["token"])

    return look
