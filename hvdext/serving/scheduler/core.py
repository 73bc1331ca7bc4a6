"""The serving core: `service.Service` on top of the ranks. It runs in the front, without TensorFlow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdext.common.wording import named_ranks
from hvdext.serving.scheduler.batching import Request, Tensors, make_request
from hvdext.serving.scheduler.catalog import Catalog
from hvdext.serving.scheduler.dispatcher import Dispatcher
from hvdext.serving.scheduler.model_names import Named
from hvdext.serving.scheduler.ranks import Ranks
from hvdext.serving.scheduler.registry import Registry, Version
from hvdext.serving.scheduler.replicas import Replica, replicas_of
from hvdext.serving.scheduler.rollout import Rollout
from hvdext.serving.service import (
    DEFAULT_SIGNATURE,
    DeadlineExceeded,
    InvalidRequest,
    ModelVersion,
    NotReady,
    OwnDeadlineExceeded,
    State,
    UnknownModel,
)
from hvdext.serving.settings import Settings


class ServingCore:
    """Models on all ranks, behind `service.Service`. Every method belongs to the event loop's thread.

    Args:
        settings: how the ranks serve.
        token: the job's secret, which supervisors and workers must know.
        repository: the folder that `load` finds models in; None: none.
        on_end: called when a rank was asked to end; the front then drains.
        note: called with what the person who runs the server should know.
    """

    def __init__(
        self,
        settings: Settings,
        token: str,
        repository: Path | None = None,
        on_end: Callable[[str], None] = lambda reason: None,
        note: Callable[[str], None] = lambda text: None,
    ):
        self._settings = settings
        self._note = note
        self._started = time.monotonic()
        self._draining = False
        self._answered = False  # whether a model has ever been ready
        self._open: set[Request] = set()
        self._change = asyncio.Event()
        self._registry = Registry()
        self._catalog = Catalog(settings, self._registry, repository)
        self._replicas = replicas_of(settings.mode, settings.size)
        self._dispatcher = Dispatcher(settings, self._replicas, self._hangs, self._changed)
        self._rollout = Rollout(settings, self._registry, self._replicas, self._loaded, self._give_up, note)
        self._ranks = Ranks(
            settings.size,
            self._replicas,
            token,
            on_complete=self._rollout.replica_complete,
            on_lost=self._lost,
            on_end=on_end,
            chunks=self._catalog.chunks,
        )

    # -- its life ----------------------------------------------------------------------------------

    async def start(self, host: str, port: int = 0) -> int:
        """Listens for the ranks; returns the port.

        Raises:
            OSError: if it cannot.
        """
        return await self._ranks.listen(host, port)

    async def drain(self, seconds: float) -> None:
        """Takes no more requests and answers those there are; who takes longer than `seconds` gets a 503."""
        self._draining = True
        try:
            await self._until(lambda: not self._open, seconds)
        except asyncio.TimeoutError:
            for request in list(self._open):
                request.finish(NotReady("The server is shutting down and could not wait for this answer."))

    async def close(self, error: str | None = None, seconds: float = 2.0) -> None:
        """Has all supervisors, and with them their workers, end.

        Args:
            error: what they are to end with; None: all is well.
            seconds: how long to wait for them.
        """
        await self._ranks.close(error, seconds)

    async def until_ready(self) -> None:
        """Waits until every model has a version that is ready; with no limit."""
        while not self.ready:
            await self._change.wait()

    # -- what the HTTP side asks for (see Service) ------------------------------------------------------

    def versions(self) -> list[ModelVersion]:
        """All versions of all models, by name and version."""
        return [version.public() for version in self._registry]

    def find(self, name: str, version: int | None = None) -> ModelVersion:
        """One version; without a number, the highest that is ready, or else the highest."""
        return self._registry.find(name, version).public()

    async def infer(
        self,
        name: str,
        version: int | None,
        inputs: Mapping[str, np.ndarray],
        timeout: float | None = None,
        signature: str = DEFAULT_SIGNATURE,
    ) -> tuple[ModelVersion, dict[str, np.ndarray]]:
        """The outputs of one request, and the version that gave them."""
        if self._draining:
            raise NotReady("The server is shutting down.")
        found = self._registry.find(name, version)
        if found.state is not State.READY:
            raise NotReady(f"{found.name}:{found.number} is not ready: {self._reason(found)}.")
        seconds, late = self._settings.timeout, DeadlineExceeded
        if timeout and timeout < seconds:
            seconds, late = timeout, OwnDeadlineExceeded
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Tensors] = loop.create_future()

        def answer(result):
            if future.done():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        if signature not in found.signatures:
            raise UnknownModel(f"{found.name}:{found.number} has no signature {signature!r}.")
        alone = found.signatures[signature].alone
        request = make_request(inputs, found.waiting.max_rows, loop.time(), answer, signature, alone)
        self._dispatcher.put(found, request)
        self._open.add(request)
        problem = late(f"The request must be answered within {seconds:g} s.")
        timer = loop.call_later(seconds, request.finish, problem)
        try:
            return found.public(), await future
        finally:
            timer.cancel()
            self._dispatcher.drop(found, request)
            self._open.discard(request)
            self._changed()

    async def load(self, name: str) -> None:
        """Loads what the repository holds of the model and is not loaded yet; returns once it is ready."""
        held = [model for model in await asyncio.to_thread(self._catalog.held) if model.name == name]
        if not held:
            raise UnknownModel(f"The name must be that of a model in the repository. Received: {name!r}.")
        try:
            versions = await self.add(held)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{name} cannot be loaded: {error}") from error
        await self.loaded(versions)

    async def unload(self, name: str, version: int | None = None) -> None:
        """Unloads a version, or all; requests that it has are answered first."""
        versions = self._registry.of(name) if version is None else [self._registry.find(name, version)]
        for one in versions:
            one.unloading = True
        seconds = self._settings.timeout + self._settings.batch_timeout
        with contextlib.suppress(asyncio.TimeoutError):  # the deadlines of its requests have passed then
            await self._until(lambda: not any(len(one.waiting) + one.in_flight for one in versions), seconds)
        for one in versions:
            self._dispatcher.fail_waiting(one, "it is being unloaded")
            self._rollout.remove(one)
        self._changed()

    def repository(self) -> list[tuple[str, int]]:
        """Names and versions that the repository holds, loaded or not; empty without a repository."""
        try:
            return [(model.name, model.version) for model in self._catalog.held()]
        except (OSError, ValueError) as error:
            self._note(f"The repository cannot be read: {error}")
            return []

    @property
    def live(self) -> bool:
        """False once the server drains."""
        return not self._draining

    @property
    def ready(self) -> bool:
        """True if it does not drain and every model that is to answer has a version that is ready.

        What has answered is to go on answering. What has not, is waited for at the start only, unless it has
        failed: a server that answers stays ready while another model is loaded, and when that fails.
        """
        ready = {version.name for version in self._registry if version.state is State.READY}
        owed = {version.name for version in self._registry if self._is_owed(version)}
        return not self._draining and owed <= ready and (bool(ready) or not list(self._registry))

    def _is_owed(self, version: Version) -> bool:
        if version.unloading:
            return False
        return version.settled or not (self._answered or version.failed)

    def status(self) -> dict[str, Any]:
        """For the page and the metrics, as plain JSON."""
        return {
            "mode": self._settings.mode,
            "uptime": time.monotonic() - self._started,
            "draining": self._draining,
            "ranks": self._ranks.status(self._is_ready),
            "models": [self._model_status(version) for version in self._registry],
            "queue": self._dispatcher.waiting,
            "max_queue": self._settings.max_queue,
        }

    def _model_status(self, version):
        return {
            "name": version.name,
            "version": version.number,
            "state": version.state.value,
            "reason": "" if version.state is State.READY else self._reason(version),
            "ranks": list(version.public().ranks),
            "queue": len(version.waiting),
            "queued_rows": version.waiting.rows,
            "in_flight": version.in_flight,
            "batches": version.batches,
            "rows": version.rows,
            "padded_rows": version.padded_rows,
            "alone": version.alone,
            "batch_sizes": {str(rows): n for rows, n in sorted(version.batch_sizes.items())},
        }

    # -- models ------------------------------------------------------------------------------------

    async def add(self, models: Iterable[Named]) -> list[Version]:
        """Begins to load models on all ranks; those that failed before are tried again.

        Returns:
            Their versions; those already there are left as they are, those being unloaded are added anew.

        Raises:
            OSError, ValueError: if one cannot be read, or is no model.
            InvalidRequest: if one is being unloaded for longer than loading may take.
        """
        versions = []
        for version in await self._catalog.look_at(models):
            known = await self._staying(version)
            if known is not None:
                if known.state is not State.UNAVAILABLE or not known.failures:
                    versions.append(known)
                    continue
                self._rollout.remove(known)
            self._registry.add(version)
            versions.append(version)
            self._rollout.spread(version)
        self._changed()
        return versions

    async def _staying(self, version: Version) -> Version | None:
        """The version of the same name and number that is there and will stay; None if there is none."""

        def leaves():
            known = self._registry.get(version.key)
            return known is not None and known.unloading

        with contextlib.suppress(asyncio.TimeoutError):
            await self._until(lambda: not leaves(), self._settings.load_timeout)
        if leaves():
            raise self._not_loaded(version, "it is still being unloaded")
        return self._registry.get(version.key)

    async def loaded(self, versions: Sequence[Version]) -> None:
        """Waits until they are ready.

        Raises:
            InvalidRequest: if one cannot be loaded, or is unloaded meanwhile.
        """

        def decided(version):
            failed = version.failures and not version.loading
            return version.state is State.READY or failed or version.unloading

        while not all(map(decided, versions)):
            try:
                await self._until(lambda: all(map(decided, versions)), self._settings.load_timeout)
            except asyncio.TimeoutError:
                if not any(version.loading for version in versions):
                    break  # otherwise a rank is at it, whose own limit ends that
        for version in versions:
            if version.state is not State.READY:
                raise self._not_loaded(version, self._reason(version))

    @staticmethod
    def _not_loaded(version, reason):
        return InvalidRequest(f"{version.name}:{version.number} could not be loaded: {reason}.")

    # -- what happens to the ranks -----------------------------------------------------------------

    def _loaded(self):
        self._dispatcher.run()
        self._changed()

    def _lost(self, replica: Replica, reason: str) -> None:
        self._note(reason)
        for version in self._rollout.replica_lost(replica):
            self._dispatcher.fail_waiting(version, reason)
        self._changed()

    def _hangs(self, replica: Replica) -> None:
        self._give_up(replica, f"no batch was done within {self._settings.batch_timeout:g} s")

    def _give_up(self, replica: Replica, reason: str) -> None:
        for rank in replica.ranks:
            self._ranks.kill(self._ranks[rank], reason)

    def _is_ready(self, replica: Replica) -> bool:
        return replica.up and not any(replica.index in version.loading for version in self._registry)

    def _reason(self, version: Version) -> str:
        missing = self._ranks.missing()
        if not version.ready and not version.loading and missing and not version.failures:
            return f"{named_ranks(missing)} {'is' if len(missing) == 1 else 'are'} not there"
        return version.reason.rstrip(".")

    def _changed(self) -> None:
        self._answered |= any(version.settled for version in self._registry) and self.ready
        self._change.set()
        self._change = asyncio.Event()

    async def _until(self, done: Callable[[], bool], seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        while not done():
            left = end - asyncio.get_running_loop().time()
            await asyncio.wait_for(self._change.wait(), max(left, 0))
