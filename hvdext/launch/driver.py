"""The process between `hvd.run` and its ranks: calls Horovod's runner and collects what the ranks tell.

It imports neither TensorFlow nor the user's modules: calls and results pass through as bytes.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from hvdext.comm.kv_store import KeyValueStore, open_server
from hvdext.common.wording import describe
from hvdext.engine.record import installed_record


@dataclass(frozen=True)
class Task:
    """What each rank calls.

    Attributes:
        call: pickle of the function, its arguments and its keyword arguments.
        stores: addresses where the driver's store may be reached, for a rank's last words.
        scope: this job's part of the store.
    """

    call: bytes
    stores: tuple[str, ...]
    scope: str

    def __call__(self) -> bytes:
        """Calls the function; returns its result as a pickle."""
        try:
            func, args, kwargs = pickle.loads(self.call)
            return cloudpickle.dumps(func(*args, **kwargs))
        except BaseException as error:  # sys.exit() too: without a result the rank has failed
            below = error.__traceback__ and error.__traceback__.tb_next  # from the function on
            self._post("".join(traceback.format_exception(type(error), error, below)))
            raise

    def _post(self, text):
        from horovod.runner.common.util.env import get_env_rank_and_size

        rank, _ = get_env_rank_and_size()
        for address in self.stores:
            store = KeyValueStore(address, self.scope)
            store.post(str(rank), json.dumps({"time": time.time(), "text": text}))
            if store.read(str(rank)) is not None:
                return


def main(folder: str) -> None:
    """Runs the request that `hvd.run` has put into `folder`; leaves the outcome there."""
    _end_with_parent()
    request = pickle.loads(Path(folder, "request").read_bytes())
    outcome = _outcome(request["call"], request["options"])
    partial = Path(folder, "outcome.partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder, "outcome"))


def _outcome(call: bytes, options: dict[str, Any]) -> dict[str, Any]:
    """The ranks' results as pickles, or the error of the runner and the ranks' tracebacks."""
    from horovod.runner import run

    tell_what_is_built()
    stores, scope = tuple(open_server()), f"hvdext-run-{secrets.token_hex(8)}"
    try:
        return {"results": run(Task(call, stores, scope), **options)}
    except Exception as error:
        size = max(options["num_proc"], options["max_num_proc"] or 0)
        return {
            "error": describe(error),
            "failures": _failures(KeyValueStore(stores[0], scope), range(size)),
        }


def tell_what_is_built() -> None:
    """The runner asks a process that imports Horovod and TensorFlow; the engine's record knows without."""
    from horovod.runner import launch

    record = installed_record()
    if record is not None:
        transports = record["transports"]
        launch.gloo_built = lambda verbose=False: "gloo" in transports
        launch.mpi_built = lambda verbose=False: "mpi" in transports


def _failures(store: KeyValueStore, ranks: Sequence[int]) -> list[tuple[int, str]]:
    """The ranks that posted a traceback, the first to fail first, and their tracebacks."""
    posted = []
    for rank in ranks:
        text = store.read(str(rank))
        if text:
            note = json.loads(text)
            posted.append((note["time"], rank, note["text"]))
    return [(rank, text) for _, rank, text in sorted(posted)]


def _end_with_parent() -> None:
    """Ends this process, and so its ranks, when the parent closes its end of the pipe or dies."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # mpirun would hand the pipe to rank 0
    os.close(nothing)

    def wait():
        while os.read(lifeline, 1024):
            continue
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="hvdext-lifeline", daemon=True).start()
