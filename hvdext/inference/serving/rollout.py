"""Brings versions of models onto the lanes, beside the batches that run there, and takes them off again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from hvdext.inference.serving.lanes import Lane, RankFailed, RankLost
from hvdext.inference.serving.registry import Registry, Version
from hvdext.inference.serving.service import Signature, TensorSpec
from hvdext.inference.serving.settings import Settings


class Rollout:
    """Loads every version of the registry on every lane that is up.

    Args:
        settings: how the ranks serve.
        registry: the versions.
        lanes: where they go.
        on_change: called whenever a lane has a version more or less.
        on_failure: called with a lane that could not be linked.
        note: called with what went wrong.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        lanes: Sequence[Lane],
        on_change: Callable[[], None],
        on_failure: Callable[[Lane, str], None],
        note: Callable[[str], None],
    ):
        self._settings = settings
        self._registry = registry
        self._lanes = lanes
        self._on_change = on_change
        self._on_failure = on_failure
        self._note = note
        self._tasks: set[asyncio.Task] = set()

    def everywhere(self, version: Version) -> None:
        """Begins to load a version on all lanes that are up."""
        for lane in self._lanes:
            if lane.up:
                self._begin(version, lane)

    def lane_complete(self, lane: Lane) -> None:
        """Links a lane whose ranks are all connected, and begins to load all versions there."""
        self._start(self._open(lane))

    def lane_lost(self, lane: Lane) -> list[Version]:
        """Notes that nothing is loaded there any more; returns the versions that no lane has now."""
        orphans = []
        for version in self._registry:
            version.loading.discard(lane.index)
            if version.ready.pop(lane.index, None) is not None and not version.ready:
                orphans.append(version)
            version.settle()
        return orphans

    def remove(self, version: Version) -> None:
        """Takes a version off all ranks.

        Those of a pipeline may have a stage of it although others have failed; one that still loads it drops
        it when it is through, since a worker does what it is told one after the other.
        """
        version.unloading = True
        self._registry.remove(version)
        for lane in self._lanes:
            self._drop(version, lane)

    @staticmethod
    def _drop(version, lane):
        lane.tell({"kind": "unload", "model": version.uid})

    def _begin(self, version, lane):
        version.loading.add(lane.index)
        for rank in lane.ranks:
            version.failures.pop(rank, None)
        self._start(self._load(version, lane))

    def _start(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, lane):
        try:
            await asyncio.wait_for(lane.link(), self._settings.load_timeout)
        except RankLost:
            return  # it will be complete again
        except (RankFailed, asyncio.TimeoutError) as error:
            self._on_failure(lane, f"the stages of the pipeline could not be linked: {error}")
            return
        for version in self._registry:
            if not version.unloading:
                self._begin(version, lane)
        self._on_change()

    async def _load(self, version: Version, lane: Lane) -> None:
        connected = dict(lane.workers)
        answers = [lane.ask(rank, self._order(version, lane, rank)) for rank in lane.ranks]
        try:
            frames = await asyncio.wait_for(asyncio.gather(*answers), self._settings.load_timeout)
        except RankLost:
            return  # lane_lost has been called or will be
        except (RankFailed, asyncio.TimeoutError) as error:
            late = f"it has not been loaded within {self._settings.load_timeout:g} s"
            reason = str(error) if isinstance(error, RankFailed) else late
            for rank, answer in zip(lane.ranks, answers, strict=True):
                if answer.cancelled() or (answer.done() and answer.exception() is not None):
                    version.failures[rank] = reason
                    self._note(f"{version.name}:{version.number} cannot be loaded on rank {rank}: {reason}")
            self._drop(version, lane)
        else:
            if lane.workers != connected:
                return
            version.signature = _signature(frames[0].header["signature"])
            version.platform = frames[0].header["platform"]
            version.ready[lane.index] = lane.ranks
        version.loading.discard(lane.index)
        if version.unloading:
            self._drop(version, lane)
        version.settle()
        self._on_change()

    def _order(self, version, lane, rank) -> dict[str, Any]:
        pipeline = self._settings.mode == "pipeline"
        sizes = self._settings.batch_sizes or (1, self._settings.max_batch_size)
        return {
            "kind": "load",
            "model": version.uid,
            "path": os.path.abspath(version.path),
            "identity": version.identity,
            "manifest": version.manifest.to_json(),
            "stage": lane.ranks.index(rank) if pipeline else None,
            "stages": len(lane.ranks),
            "sizes": sorted(set(sizes)),
        }


def _signature(sides: dict[str, list[list[Any]]]) -> Signature:
    def specs(side):
        return tuple(TensorSpec(name, datatype, tuple(shape)) for name, datatype, shape in sides[side])

    return Signature(specs("inputs"), specs("outputs"))


def signature_json(signature: Signature) -> dict[str, list[list[Any]]]:
    """The signature as a frame's header carries it."""
    return {
        side: [[spec.name, spec.datatype, list(spec.shape)] for spec in getattr(signature, side)]
        for side in ("inputs", "outputs")
    }
