"""Replicas: whole copies of the models, as the front sees them.

With the mode "replicas" each rank is one; a pipeline is one replica, from its first stage to its last.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdext.serving.scheduler.load_balancing import Load
from hvdext.serving.transport.frames import Frame
from hvdext.serving.transport.peer import Peer


class RankLost(Exception):
    """A rank was lost while it was asked for something."""


class RankFailed(Exception):
    """A rank could not do what it was asked for; the message says why."""


class Replica:
    """Ranks that compute a batch together. It is up while all of them are connected and linked.

    Args:
        index: the replica's number.
        ranks: in the order of the stages.

    Attributes:
        workers: those connected, by rank.
        up: whether batches may be sent.
        load: the batches that it has.
        suspect: the batch that was being computed when a rank was lost.
    """

    def __init__(self, index: int, ranks: Sequence[int]):
        self.index = index
        self.ranks = tuple(ranks)
        self.workers: dict[int, Peer] = {}
        self.up = False
        self.load = Load(len(self.ranks))
        self.suspect: int | None = None
        self._numbers = itertools.count(1)  # of what it was asked
        self._asked: dict[int, asyncio.Future[Frame]] = {}

    @property
    def complete(self) -> bool:
        """True if all its ranks are connected."""
        return len(self.workers) == len(self.ranks)

    def ask(
        self, rank: int, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None
    ) -> asyncio.Future[Frame]:
        """Asks a rank for something; a pipeline's answer may come from another of the replica.

        Returns:
            The answer; or `RankLost`, or `RankFailed`.
        """
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        future.add_done_callback(lambda _: self._asked.pop(number, None))
        if rank not in self.workers:
            future.set_exception(RankLost(f"rank {rank} is not connected"))
            return future
        try:
            self.workers[rank].send({**header, "id": number}, tensors)
        except (TypeError, ValueError) as error:
            future.set_exception(RankFailed(str(error)))
        return future

    def tell(self, header: Mapping[str, Any]) -> None:
        """Tells all ranks something that has no answer."""
        for worker in self.workers.values():
            worker.send(header)

    def answered(self, frame: Frame) -> None:
        """Takes an answer. Nobody waits for it any more if its rank counted as lost meanwhile."""
        future = self._asked.get(frame.header.get("id"))  # type: ignore[arg-type]
        if future is None or future.done():
            return
        if frame.kind == "failed":
            future.set_exception(RankFailed(str(frame.header.get("error"))))
        else:
            future.set_result(frame)

    async def link(self) -> None:
        """Has each stage connect to the next one; then the replica is up.

        Raises:
            RankLost, RankFailed: if one is lost or does not reach the next.
        """
        for rank, following in itertools.pairwise(self.ranks):
            next_one = self.workers[following]
            address = [next_one.host, next_one.facts["link_port"]]
            await self.ask(rank, {"kind": "link", "address": address})
        if not self.complete:
            raise RankLost("a rank was lost before the replica was up")
        self.up = True

    def drop(self, rank: int, reason: str) -> None:
        """A rank is lost, and with it the replica's work."""
        self.workers.pop(rank, None)
        self.unlink(f"rank {rank} was lost: {reason}")

    def unlink(self, reason: str) -> None:
        """The replica is down: whatever it was asked for has no answer."""
        self.up = False
        self.suspect = self.load.computing
        for future in list(self._asked.values()):
            if not future.done():
                future.set_exception(RankLost(reason))


def replicas_of(mode: str, size: int) -> list[Replica]:
    """One replica per rank with replicas, one of all ranks with a pipeline."""
    if mode == "pipeline":
        return [Replica(0, range(size))]
    return [Replica(rank, [rank]) for rank in range(size)]
