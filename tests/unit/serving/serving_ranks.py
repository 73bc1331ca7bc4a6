"""A serving core whose workers are threads of this process, over real sockets; their models are NumPy's."""

import asyncio
import contextlib
import functools
import threading
import time

import numpy as np

from hvdext.serving.scheduler.core import ServingCore
from hvdext.serving.scheduler.model_names import Named
from hvdext.serving.service import DEFAULT_SIGNATURE, Signature, TensorSpec
from hvdext.serving.settings import Settings
from hvdext.serving.transport.connection import connect
from hvdext.serving.worker.worker import Post, Worker

TOKEN = "a token for tests"


class Model:
    """Returns its inputs times `factor`; stage s of a pipeline adds s.

    Attributes:
        calls: rows of each batch.
        before: called with the rows before they are computed.
    """

    platform = "numpy"

    def __init__(self, factor=10.0, width=1, before=lambda rows: None, alone=""):
        spec = TensorSpec("x", "FP32", (None, width))
        self.takes = (spec,)
        outputs = (TensorSpec("y", "FP32", (None, width)),)
        self.signatures = {DEFAULT_SIGNATURE: Signature((spec,), outputs, alone)}
        self.factor = factor
        self.before = before
        self.calls = []

    def of(self, signature):
        return self

    def run(self, inputs):
        self.before(inputs["x"])
        self.calls.append(len(inputs["x"]))
        return {"y": inputs["x"] * np.float32(self.factor)}


class Gate:
    """Holds batches back until it is opened."""

    def __init__(self):
        self.open = threading.Event()
        self.came = threading.Semaphore(0)

    def __call__(self, rows):
        if rows.any():  # not the warm-up
            self.came.release()
            assert self.open.wait(10)


class Cluster:
    """A core and its ranks.

    Args:
        folder: for models and repository.
        load: what workers load models with; default: `Model()`.
        fatal: called with a rank and a path; True if loading ends the worker, as lack of memory would.
        supervised: whether lost workers are started again.
        on_end: called when a rank was asked to end.
        **settings: of `Settings`.
    """

    def __init__(
        self,
        folder,
        load=None,
        fatal=lambda rank, path: False,
        supervised=False,
        on_end=lambda reason: None,
        **settings,
    ):
        self.folder = folder
        self.settings = Settings(**{"max_delay": 0.005, "size": 2, "timeout": 10.0, **settings})
        self.notes = []
        self.workers = {}
        self.models = []  # as they were loaded
        self._load = load or (lambda path, stage, stages: Model())
        self.deaths = []  # ranks, in the order in which a model ended them
        self._fatal = fatal
        self._supervised = supervised
        self._on_end = on_end

    async def __aenter__(self):
        repository = self.folder / "repository"
        self.core = ServingCore(self.settings, TOKEN, repository, self._on_end, self.notes.append)
        self.port = await self.core.start("127.0.0.1")
        for rank in range(self.settings.size):
            await asyncio.to_thread(self.start_rank, rank)
        return self

    async def __aexit__(self, *exc_info):
        self._supervised = False
        await self.core.close(seconds=0.2)
        for worker in self.workers.values():
            worker.close()

    def start_rank(self, rank, restarts=0):
        pipeline = self.settings.mode == "pipeline"
        addresses = [("127.0.0.1", self.port)]
        if self._supervised and not restarts:
            facts = {"role": "supervisor", "rank": rank, "size": self.settings.size}
            supervisor, _ = connect(addresses, TOKEN, facts)
            threading.Thread(target=self._supervise, args=[rank, supervisor], daemon=True).start()
        post = Post(rank, self.settings.size, addresses, TOKEN, pipeline, restarts)
        self.workers[rank] = Worker(post, functools.partial(self._loaded, rank))
        threading.Thread(target=self._work, args=[rank, restarts], daemon=True).start()

    def _work(self, rank, restarts):
        self.workers[rank].run()
        if self._supervised:
            time.sleep(0.05)
            with contextlib.suppress(ConnectionError):
                self.start_rank(rank, restarts + 1)

    def _supervise(self, rank, supervisor):
        with contextlib.suppress(OSError):
            while (frame := supervisor.receive()) is not None and frame.kind != "exit":
                if frame.kind == "kill":
                    self.workers[rank].close()
        supervisor.close()

    def _loaded(self, rank, path, stage, stages):
        if self._fatal(rank, path):
            self.deaths.append(rank)
            self.workers[rank].close()
        model = self._load(path, stage, stages)
        model.rank = rank
        self.models.append(model)
        return model

    def file(self, name, text="model"):
        """A file that passes for a model's."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    async def add(self, name="m", version=1):
        """Loads a model, ready when this returns."""
        versions = await self.core.add([Named(name, version, self.file(f"{name}{version}.keras"))])
        await self.core.loaded(versions)

    async def until(self, condition, seconds=20.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.core.status()
            await asyncio.sleep(0.005)

    async def ask(self, *values, name="m", version=None, timeout=None):
        """The answers to some values, one row each."""
        inputs = {"x": np.array(values, np.float32)[:, None]}
        _, outputs = await self.core.infer(name, version, inputs, timeout)
        assert outputs["y"].shape == (len(values), 1)
        return outputs["y"][:, 0].tolist()


def serve(folder, program, **options):
    """Runs `program(cluster)` with a cluster whose model m is ready, for 30 s at most."""

    async def main():
        async with Cluster(folder, **options) as cluster:
            await cluster.add()
            return await program(cluster)

    return asyncio.run(asyncio.wait_for(main(), 30))
