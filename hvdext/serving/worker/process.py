"""The process of a worker: `python -m hvdext.serving.worker.process`, started by a supervisor.

What it needs to know comes in the environment variable HVDEXT_SERVE_WORKER, as JSON: the arguments of
others may be read by anyone on the host, their environment may not.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hvdext.common.log import logger, set_rank
from hvdext.serving.transport.handshake import Refused
from hvdext.serving.worker.worker import Load, Post, Worker

VARIABLE = "HVDEXT_SERVE_WORKER"
_log = logger("serve")
_PR_SET_PDEATHSIG = 1
_LINGER = 10.0  # seconds


def main(load: Load | None = None) -> int:
    """Runs the worker; returns the process's exit code.

    Args:
        load: loads a model; default: `served_model.load`, with TensorFlow set up for this rank.
    """
    config = json.loads(os.environ.pop(VARIABLE))
    _die_with(config["supervisor"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    post = Post(**config["post"])
    set_rank(post.rank)
    loader = _Loader(config["threads"], config["local_rank"], config["modules"])
    try:
        worker = Worker(post, load or loader.load)
    except (ConnectionError, Refused) as error:
        _log.error("%s", error)
        return 1

    def pass_on():
        # horovodrun, asked to end, signals its processes' children; the front must hear of it.
        asked.wait()
        worker.ask_to_end(f"rank {post.rank} got SIGTERM")

    threading.Thread(target=pass_on, name="hvdext-sigterm", daemon=True).start()
    worker.run()
    if asked.is_set():
        # horovodrun freezes a rank's process, and then kills it, as soon as its children are gone. So this
        # one must not be the first to end; it dies with its supervisor.
        time.sleep(_LINGER)
    return 0


class _Loader:
    """Sets TensorFlow up when the first model is loaded: until then the worker needs none.

    Args:
        threads: for one operation.
        local_rank: which of the host's GPUs, where there are several.
        modules: register the models' own layers.
    """

    def __init__(self, threads: int, local_rank: int, modules: Sequence[str]):
        self._modules = modules
        self._threads = threads
        self._local_rank = local_rank
        self._ready = False

    def load(self, path: Path, stage: int | None, stages: int) -> Any:
        """`served_model.load`."""
        if not self._ready:
            self._set_up()
            self._ready = True
        from hvdext.serving.worker import served_model

        return served_model.load(path, stage=stage, stages=stages)

    def _set_up(self):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(self._threads)
        tf.config.threading.set_inter_op_parallelism_threads(self._threads)
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            mine = gpus[self._local_rank % len(gpus)]
            tf.config.set_visible_devices(mine, "GPU")
            tf.config.experimental.set_memory_growth(mine, True)
        sys.path.insert(0, os.getcwd())  # where the user's modules are
        for module in self._modules:
            importlib.import_module(module)


def _die_with(supervisor: int) -> None:
    """Has the kernel kill this process when its supervisor ends, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it was quicker
        os._exit(1)


def end(code: int) -> NoReturn:
    """Ends the process, without waiting for a batch that nobody wants any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
