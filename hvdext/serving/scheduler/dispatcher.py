"""Takes batches out of the queues, gives each to a replica, and brings the answers back to the requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from hvdext.common.wording import describe
from hvdext.serving.scheduler import batching
from hvdext.serving.scheduler.batching import Part, Request
from hvdext.serving.scheduler.load_balancing import Throughput, choose
from hvdext.serving.scheduler.registry import Version
from hvdext.serving.scheduler.replicas import RankFailed, RankLost, Replica
from hvdext.serving.service import ComputationFailed, InvalidRequest, NotReady, QueueFull
from hvdext.serving.settings import Settings
from hvdext.serving.transport.frames import Frame

_TRIES = 2  # ranks that may be lost while they compute a request


class Dispatcher:
    """Everything in it runs in the event loop's thread and returns at once.

    Args:
        settings: how the ranks serve.
        replicas: who computes.
        on_hang: called with a replica that has not finished a batch within `batch_timeout`.
        on_done: called after each batch.
    """

    def __init__(
        self,
        settings: Settings,
        replicas: Sequence[Replica],
        on_hang: Callable[[Replica], None],
        on_done: Callable[[], None],
    ):
        self._settings = settings
        self._replicas = replicas
        self._on_hang = on_hang
        self._on_done = on_done
        self._turns: dict[Version, None] = {}  # versions with waiting parts; who was served goes to the end
        self._bytes: dict[Request, int] = {}  # of the requests that wait
        self._waiting_bytes = 0
        self._throughput = Throughput()
        self._timer: asyncio.TimerHandle | None = None
        self._watches: dict[int, asyncio.TimerHandle] = {}

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._bytes)

    # -- into the queue ----------------------------------------------------------------------------

    def put(self, version: Version, request: Request) -> None:
        """Lets a request wait for its turn.

        Raises:
            QueueFull: if too much waits already.
            InvalidRequest: if it is more than may ever wait.
        """
        size = sum(_bytes(array) for array in request.inputs.values())
        most = self._settings.max_queue_bytes
        if size > most:
            raise InvalidRequest(f"A request's inputs may have {most} bytes. Received: {size}.")
        full = len(self._bytes) >= self._settings.max_queue
        if full or self._waiting_bytes + size > most:
            error = QueueFull(
                f"The queue is full: {len(self._bytes)} requests with {self._waiting_bytes} bytes wait."
            )
            now = asyncio.get_running_loop().time()
            rows = sum(version.waiting.rows for version in self._turns)
            error.retry_after = self._throughput.seconds_for(rows, now)
            raise error
        self._bytes[request] = size
        self._waiting_bytes += size
        for part in request.parts:
            version.waiting.put(part)
        self._turns.setdefault(version)
        self.run()

    def drop(self, version: Version, request: Request) -> None:
        """Forgets a request that has been answered, or whose client is gone."""
        request.done = True
        self._has_left(request)
        for part in request.parts:
            version.waiting.drop(part)

    def fail_waiting(self, version: Version, reason: str) -> None:
        """Answers all that wait for a version that no rank has any more."""
        for part in version.waiting.drop_all():
            part.request.finish(NotReady(f"{version.name}:{version.number} is not ready: {reason}."))

    def _has_left(self, request):
        self._waiting_bytes -= self._bytes.pop(request, 0)

    # -- out of the queue --------------------------------------------------------------------------

    def run(self) -> None:
        """Sends every batch that may leave now; sees to it that the next is not forgotten."""
        now = asyncio.get_running_loop().time()
        while (chosen := self._next(now)) is not None:
            self._send(*chosen)
        if self._timer is not None:
            self._timer.cancel()
        due = [version.waiting.due_at() for version in self._turns]
        later = min((at for at in due if at is not None and at > now), default=None)
        self._timer = None if later is None else asyncio.get_running_loop().call_at(later, self.run)

    def _next(self, now):
        for version in list(self._turns):
            due = version.waiting.due_at()
            if due is None:
                del self._turns[version]
            elif due <= now:
                loads = {index: self._replicas[index].load for index in version.ready}
                index = choose(loads, version.waiting.full)
                if index is not None:
                    return version, self._replicas[index]
        return None

    def _send(self, version: Version, replica: Replica) -> None:
        self._turns[version] = self._turns.pop(version)
        parts = version.waiting.take()
        for part in parts:
            if part is part.request.parts[-1]:
                self._has_left(part.request)
        first = parts[0].request
        sizes = () if first.apart else self._settings.batch_sizes
        rows = batching.padded_rows(sum(part.rows for part in parts), sizes)
        tensors = batching.joined_inputs(parts, rows)
        header = {"kind": "batch", "model": version.uid, "signature": first.signature, "rows": rows}
        answer = replica.ask(replica.ranks[0], header, tensors)
        batch = id(answer)
        replica.load.start(batch, version.uid, rows)
        version.in_flight += len(parts)
        if len(replica.load) == 1:
            self._watch(replica)
        answer.add_done_callback(lambda answer: self._done(version, replica, parts, rows, batch, answer))

    # -- and back ----------------------------------------------------------------------------------

    def _done(self, version, replica, parts, rows, batch, answer):
        seconds = None
        error = answer.exception()
        if error is None:
            frame = answer.result()
            seconds = sum(frame.header["seconds"].values())
            error = _problem(frame, rows)
        replica.load.end(batch, seconds if error is None else None)
        version.in_flight -= len(parts)
        self._watch(replica)
        if error is None:
            self._count(version, parts, rows)
            for part, outputs in zip(parts, batching.cut_outputs(frame.tensors, parts), strict=True):
                self._part_done(version, part, outputs)
        else:
            self._try_again(version, parts, error, batch == replica.suspect)
        self.run()
        self._on_done()

    def _part_done(self, version, part, outputs):
        """Whatever is wrong with one answer, the others of the batch get theirs."""
        try:
            part.request.part_done(part, outputs)
        except Exception as error:
            part.request.finish(
                ComputationFailed(
                    f"{version.name}:{version.number} gave outputs that make no answer: {describe(error)}"
                )
            )

    def _try_again(self, version: Version, parts: Iterable[Part], error: Exception, suspect: bool) -> None:
        """One bad request must not fail its neighbours: each runs alone, and only what fails alone is bad.

        What a lost rank had runs alone on another rank: predictions may be repeated. What it was computing
        when it was lost (`suspect`) may be the cause, and has one such chance only.
        """
        parts = [part for part in parts if not part.request.done]
        for part in parts:
            if isinstance(error, RankLost):
                part.losses += suspect
                again = part.losses < _TRIES and bool(version.ready)
            else:
                again = not part.alone and len(parts) > 1
            if again:
                part.alone = True
                version.waiting.put(part)
                self._turns.setdefault(version)
            else:
                what = "failed" if isinstance(error, RankFailed) else "did not answer"
                part.request.finish(
                    ComputationFailed(f"{version.name}:{version.number} {what} on this request: {error}")
                )

    def _count(self, version, parts, rows):
        real = sum(part.rows for part in parts)
        version.batches += 1
        version.rows += real
        version.padded_rows += rows - real
        version.batch_sizes[real] += 1
        self._throughput.add(real, asyncio.get_running_loop().time())

    def _watch(self, replica):
        """A replica must finish some batch every `batch_timeout` seconds, as long as it has any."""
        if replica.index in self._watches:
            self._watches.pop(replica.index).cancel()
        if len(replica.load):
            loop = asyncio.get_running_loop()
            self._watches[replica.index] = loop.call_later(
                self._settings.batch_timeout, self._on_hang, replica
            )


def _problem(frame: Frame, rows: int) -> RankFailed | None:
    for name, array in frame.tensors.items():
        if array.ndim == 0 or len(array) != rows:
            return RankFailed(
                f"output {name!r} must have {rows} rows, as the inputs. Received: shape {array.shape}."
            )
    return None


def _bytes(array):
    if array.dtype == object:
        return array.nbytes + sum(map(len, array.ravel()))
    return array.nbytes
