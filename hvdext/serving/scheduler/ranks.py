"""The front's side of the ranks: who is connected, what each has done, and who must be started again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hvdext.serving.scheduler.replicas import Replica
from hvdext.serving.transport.frames import Frame
from hvdext.serving.transport.handshake import Refused
from hvdext.serving.transport.peer import Peer
from hvdext.serving.transport.sending import send_chunks


@dataclass(eq=False)
class Rank:
    """One rank: its supervisor, and the worker that the supervisor has started.

    Attributes:
        number: the rank.
        replica: the replica that it belongs to.
        supervisor: its connection, if there is one.
        worker: likewise.
        host: its host's name.
        pid: the worker's process.
        restarts: how often the worker was started again.
        batches: done by all its workers so far.
        rows: likewise.
        busy: seconds that they have computed.
    """

    number: int
    replica: Replica
    supervisor: Peer | None = None
    worker: Peer | None = None
    host: str = ""
    pid: int = 0
    restarts: int = 0
    batches: int = 0
    rows: int = 0
    busy: float = 0.0


class Ranks:
    """Listens for supervisors, workers and those who fetch a model.

    Args:
        size: how many ranks there are.
        replicas: what they are divided into.
        token: the job's secret.
        on_complete: called with a replica when its last rank has connected.
        on_lost: called with a replica when one of its ranks is lost.
        on_end: called with a reason when a rank has been asked to end, as by horovodrun.
        chunks: gives a model's bytes by its digest; raises LookupError if there is none.
    """

    def __init__(
        self,
        size: int,
        replicas: list[Replica],
        token: str,
        on_complete: Callable[[Replica], None],
        on_lost: Callable[[Replica, str], None],
        on_end: Callable[[str], None],
        chunks: Callable[[str], Iterator[bytes]],
    ):
        self._ranks = [Rank(rank, replica) for replica in replicas for rank in replica.ranks]
        assert len(self._ranks) == size
        self._token = token
        self._on_complete = on_complete
        self._on_lost = on_lost
        self._on_end = on_end
        self._chunks = chunks
        self._left = asyncio.Event()

    def __getitem__(self, number: int) -> Rank:
        return self._ranks[number]

    def __iter__(self) -> Iterator[Rank]:
        return iter(self._ranks)

    async def listen(self, host: str, port: int) -> int:
        """Begins to listen; returns the port.

        Raises:
            OSError: if it cannot.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._peer, host, port, family=socket.AF_INET)
        return self._server.sockets[0].getsockname()[1]

    async def close(self, error: str | None, seconds: float) -> None:
        """Tells the supervisors to end, waits until they have, and listens no longer.

        Args:
            error: what they end with; None: all is well.
            seconds: how long to wait.
        """
        for rank in self._ranks:
            if rank.supervisor is not None:
                rank.supervisor.send({"kind": "exit", "error": error})
        with contextlib.suppress(asyncio.TimeoutError):
            while any(rank.supervisor is not None for rank in self._ranks):
                self._left.clear()
                await asyncio.wait_for(self._left.wait(), seconds)
        self._server.close()

    def kill(self, rank: Rank, reason: str) -> None:
        """Gives a worker up; its supervisor kills the process and starts a new one."""
        if rank.worker is not None:
            rank.worker.end(reason)

    def missing(self) -> list[int]:
        """The ranks whose worker is not connected."""
        return [rank.number for rank in self._ranks if rank.worker is None]

    # -- who connects ------------------------------------------------------------------------------

    def _peer(self):
        return Peer(self._token, self._check, self._arrived)

    def _check(self, peer):
        facts = peer.facts
        if facts.get("role") == "fetch":
            return
        size = len(self._ranks)
        if facts.get("size") != size:
            raise Refused(
                f"all ranks must be started with as many ranks: {size}. Received: {facts.get('size')}."
            )
        rank = facts.get("rank")
        if type(rank) is not int or not 0 <= rank < size or facts.get("role") not in ("worker", "supervisor"):
            raise Refused(f"the caller must be a rank's worker or supervisor. Received: {facts}.")

    def _arrived(self, peer):
        if peer.facts["role"] == "fetch":
            send_chunks(peer, self._chunks)
        elif peer.facts["role"] == "supervisor":
            self._add_supervisor(self._ranks[peer.facts["rank"]], peer)
        else:
            self._add_worker(self._ranks[peer.facts["rank"]], peer)

    def _add_supervisor(self, rank, peer):
        def lost(reason):
            if rank.supervisor is peer:
                rank.supervisor = None
                self._left.set()

        rank.supervisor = peer
        peer.on_lost = lost
        peer.on_frame = self._on_control

    def _add_worker(self, rank, peer):
        if rank.worker is not None:
            self._worker_lost(rank, rank.worker, "a new worker has taken its place")
        rank.worker, rank.pid = peer, peer.facts["pid"]
        rank.host, rank.restarts = peer.facts["host"], peer.facts["restarts"]
        peer.on_lost = lambda reason: self._worker_lost(rank, peer, reason)
        peer.on_frame = lambda frame: self._on_worker(rank, frame)
        rank.replica.workers[rank.number] = peer
        if rank.replica.complete:
            self._on_complete(rank.replica)

    def _worker_lost(self, rank, peer, reason):
        if rank.worker is not peer:
            return
        rank.worker = None
        if peer.given_up and rank.supervisor is not None:  # it may hang, and would not end by itself
            rank.supervisor.send({"kind": "kill", "pid": peer.facts["pid"]})
        rank.replica.drop(rank.number, reason)
        peer.end(reason)
        self._on_lost(rank.replica, f"rank {rank.number} was lost: {reason}")

    # -- what they tell ----------------------------------------------------------------------------

    def _on_control(self, frame: Frame) -> None:
        if frame.kind == "asked_to_end":
            self._on_end(str(frame.header.get("reason")))

    def _on_worker(self, rank: Rank, frame: Frame) -> None:
        if frame.kind == "asked_to_end":
            self._on_control(frame)
            return
        if frame.kind == "link_lost":
            self._link_lost(rank, str(frame.header.get("reason")))
            return
        for number, seconds in frame.header.get("seconds", {}).items():
            self._ranks[int(number)].busy += seconds
            self._ranks[int(number)].batches += 1
            self._ranks[int(number)].rows += frame.header["rows"]
        rank.replica.answered(frame)

    def _link_lost(self, rank, reason):
        replica = rank.replica
        if replica.up:  # otherwise the next rank is known to be lost already
            reason = f"rank {rank.number} does not reach the next stage: {reason}"
            replica.unlink(reason)
            self._on_lost(replica, reason)
            self._on_complete(replica)

    def status(self, is_ready: Callable[[Replica], bool]) -> list[dict[str, Any]]:
        """What `Service.status` tells of the ranks.

        Args:
            is_ready: whether a replica answers.
        """
        return [
            {
                "rank": rank.number,
                "host": rank.host,
                "pid": rank.pid,
                "state": self._state(rank, is_ready),
                "in_flight": len(rank.replica.load),
                "batches": rank.batches,
                "rows": rank.rows,
                "busy": round(rank.busy, 6),
                "restarts": rank.restarts,
            }
            for rank in self._ranks
        ]

    @staticmethod
    def _state(rank, is_ready):
        if rank.worker is None:
            return "lost" if rank.pid else "starting"
        return "ready" if is_ready(rank.replica) else "starting"
