"""Brings versions of models onto the replicas, beside the batches that run there, and takes them off."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdext.serving.scheduler.registry import Registry, Version
from hvdext.serving.scheduler.replicas import RankFailed, RankLost, Replica
from hvdext.serving.service import DEFAULT_SIGNATURE, Signature, TensorSpec
from hvdext.serving.settings import Settings

_TRIES = 2  # how often loading a version may cost ranks, where that is not known to be its own doing


class Rollout:
    """Loads every version of the registry on every replica that is up, one after the other on each.

    Loading may end a rank's process: too little memory, a crash in an operation of the model's. So a new
    version beside others that answer is tried on one replica, and the others follow once a rank has lived
    through it. What has cost ranks is given up, until it is asked for anew: a worker that is started again
    would only die of it again.

    Args:
        settings: how the ranks serve.
        registry: the versions.
        replicas: where they go.
        on_change: called whenever a replica has a version more or less.
        on_failure: called with a replica that could not be linked.
        note: called with what went wrong.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        replicas: Sequence[Replica],
        on_change: Callable[[], None],
        on_failure: Callable[[Replica, str], None],
        note: Callable[[str], None],
    ):
        self._settings = settings
        self._registry = registry
        self._replicas = replicas
        self._on_change = on_change
        self._on_failure = on_failure
        self._note = note
        self._tasks: set[asyncio.Task] = set()
        # What a replica loads: the first one now. A replica that is lost gets a new list.
        self._queues: dict[int, list[Version]] = {replica.index: [] for replica in replicas}

    def spread(self, version: Version) -> None:
        """Begins to load it on all replicas that are up, do not have it, have not failed and may try."""
        for replica in self._replicas:
            has_failed = any(rank in version.failures for rank in replica.ranks)
            failed = has_failed and not version.losses[replica.index]
            if replica.up and not failed and self._may_load(version, replica):
                self._begin(version, replica)

    def replica_complete(self, replica: Replica) -> None:
        """Links a replica whose ranks are all connected, and begins to load all versions there."""
        self._start(self._open(replica))

    def replica_lost(self, replica: Replica) -> list[Version]:
        """Notes that nothing is loaded there any more; returns the versions that no replica has now."""
        orphans = []
        queue, self._queues[replica.index] = self._queues[replica.index], []
        for version in self._registry:
            version.loading.discard(replica.index)
            if version.ready.pop(replica.index, None) is not None and not version.ready:
                orphans.append(version)
        if queue and not replica.complete:  # otherwise only a link between stages was lost
            self._blame(queue[0], replica)
        for version in self._registry:
            version.settle()
        for version in queue[1:]:
            if not version.survived:  # it was to be tried there
                self.spread(version)
        return orphans

    def remove(self, version: Version) -> None:
        """Takes a version off all ranks.

        Those of a pipeline may have a stage of it although others have failed; one that still loads it drops
        it when it is through, since a worker does what it is told one after the other.
        """
        version.unloading = True
        self._registry.remove(version)
        for replica in self._replicas:
            self._drop(version, replica)

    @staticmethod
    def _drop(version, replica):
        replica.tell({"kind": "unload", "model": version.uid})

    def _may_load(self, version: Version, replica: Replica) -> bool:
        there = replica.index in version.ready or replica.index in version.loading
        if there or version.unloading or self._given_up(version, replica):
            return False
        alone = not version.survived and self._others_answer(version)
        return not (alone and (version.loading or version.failures))

    @staticmethod
    def _given_up(version, replica):
        losses = version.losses[replica.index] if version.survived else version.losses.total()
        return losses >= _TRIES

    def _others_answer(self, version):
        others = (other for other in self._registry if other is not version)
        return any(other.settled and not other.unloading for other in others)

    def _blame(self, version: Version, replica: Replica) -> None:
        """A rank was lost while it loaded the version: once is enough where that disturbs others."""
        once = not version.survived and self._others_answer(version)
        version.losses[replica.index] += _TRIES if once else 1
        if self._given_up(version, replica):
            for rank in replica.ranks:
                if rank not in replica.workers:
                    self._failed(version, rank, "its loading ended the rank's process")
            self._drop(version, replica)

    def _failed(self, version, rank, reason):
        version.failures[rank] = reason
        self._note(f"{version.name}:{version.number} cannot be loaded on rank {rank}: {reason}")

    def _begin(self, version, replica):
        version.loading.add(replica.index)
        for rank in replica.ranks:
            version.failures.pop(rank, None)
        queue = self._queues[replica.index]
        queue.append(version)
        if len(queue) == 1:
            self._start(self._load_all(queue, replica))

    def _start(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, replica):
        try:
            await asyncio.wait_for(replica.link(), self._settings.load_timeout)
        except RankLost:
            return  # it will be complete again
        except (RankFailed, asyncio.TimeoutError) as error:
            self._on_failure(replica, f"the stages of the pipeline could not be linked: {error}")
            return
        # First what is known to do no harm: it answers again although another may cost the ranks once more.
        for version in sorted(self._registry, key=lambda version: not version.survived):
            if self._may_load(version, replica):
                self._begin(version, replica)
        self._on_change()

    async def _load_all(self, queue: list[Version], replica: Replica) -> None:
        while queue and queue is self._queues[replica.index]:
            version = queue[0]
            if not version.unloading and not self._given_up(version, replica):
                await self._load(version, replica)
            if queue is not self._queues[replica.index]:
                return  # the replica was lost
            del queue[0]
            version.loading.discard(replica.index)
            if version.survived:
                self.spread(version)
            version.settle()
            self._on_change()

    async def _load(self, version: Version, replica: Replica) -> None:
        """Loads a version on a replica; every rank has answered then, or is late, or the replica was lost."""
        queue = self._queues[replica.index]
        answers = {rank: replica.ask(rank, self._order(version, replica, rank)) for rank in replica.ranks}
        await asyncio.wait(answers.values(), timeout=self._settings.load_timeout)
        late = [rank for rank, answer in answers.items() if not answer.done()]
        failed = {rank: answer.exception() for rank, answer in answers.items() if answer.done()}
        if queue is not self._queues[replica.index]:
            return
        if not late and not version.survived:
            version.survived = True
            # Where ranks were lost meanwhile it may have been an accident.
            version.losses = Counter(dict.fromkeys(version.losses, 1))
        version.losses.pop(replica.index, None)
        for rank in late:
            answers[rank].cancel()
            self._failed(version, rank, f"it has not been loaded within {self._settings.load_timeout:g} s")
        for rank, error in failed.items():
            if error is not None:
                self._failed(version, rank, str(error))
        if late or any(failed.values()) or version.unloading:
            self._drop(version, replica)
            return
        headers = [answers[rank].result().header for rank in replica.ranks]
        self._describe(version, [_signatures(header["signatures"]) for header in headers])
        version.platform = headers[0]["platform"]
        version.ready[replica.index] = replica.ranks

    def _describe(self, version: Version, stages: Sequence[dict[str, Signature]]) -> None:
        """What a replica's ranks say of a version: the first knows the inputs, the last the outputs.

        Each tells of its stage whether rows depend on each other. What one replica has found holds for all.
        """
        known = set(version.signatures)
        for name, first in stages[0].items():
            reasons = [one[name].alone for one in stages]
            if name in known:
                reasons.append(version.signatures[name].alone)
            alone = self._settings.why_alone(next(filter(None, reasons), ""))
            version.signatures[name] = Signature(first.inputs, stages[-1][name].outputs, alone)
            if alone and name not in known:
                called = "" if name == DEFAULT_SIGNATURE else f" ({name})"
                self._note(
                    f"{version.name}:{version.number}{called}: each request is computed by itself: {alone}"
                )

    def _order(self, version, replica, rank) -> dict[str, Any]:
        pipeline = self._settings.mode == "pipeline"
        sizes = self._settings.batch_sizes or (1, self._settings.max_batch_size)
        return {
            "kind": "load",
            "model": version.uid,
            "path": os.path.abspath(version.path),
            "identity": version.identity,
            "manifest": version.manifest.to_json(),
            "stage": replica.ranks.index(rank) if pipeline else None,
            "stages": len(replica.ranks),
            "sizes": sorted(set(sizes)),
        }


def _signatures(named: dict[str, dict[str, Any]]) -> dict[str, Signature]:
    def specs(side):
        return tuple(
            TensorSpec(name, datatype, tuple(shape), optional) for name, datatype, shape, optional in side
        )

    return {
        name: Signature(specs(one["inputs"]), specs(one["outputs"]), one["alone"])
        for name, one in named.items()
    }


def signatures_json(signatures: Mapping[str, Signature]) -> dict[str, dict[str, Any]]:
    """Signatures by name as a frame's header carries them."""

    def specs(side):
        return [[spec.name, spec.datatype, list(spec.shape), spec.optional] for spec in side]

    return {
        name: {"inputs": specs(one.inputs), "outputs": specs(one.outputs), "alone": one.alone}
        for name, one in signatures.items()
    }
