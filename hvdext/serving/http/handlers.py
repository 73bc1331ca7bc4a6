"""What the endpoints of both protocols share: which version is meant, and the service's answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

import anyio
import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from hvdext.serving.http.bodies import Bodies
from hvdext.serving.http.offload import LARGE_BYTES, Offload
from hvdext.serving.http.request_metrics import call_of
from hvdext.serving.protocols.tensors import short
from hvdext.serving.service import DEFAULT_SIGNATURE, ModelVersion, NotReady, Service, Signature, UnknownModel

T = TypeVar("T")
Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """What the endpoints of a protocol work with.

    Args:
        service: the models.
        bodies: reads what clients send.
        reading: parses what is large.
        writing: writes answers that are large.
    """

    def __init__(self, service: Service, bodies: Bodies, reading: Offload, writing: Offload):
        self._service = service
        self._bodies = bodies
        self._reading = reading
        self._writing = writing


def route_table(rows: Iterable[tuple[str, str, Endpoint]]) -> list[Route]:
    """Starlette's routes of rows (path, method, endpoint)."""
    return [Route(path, endpoint, methods=[method]) for path, method, endpoint in rows]


def version_of(request: Request) -> int | None:
    """The version that the path names; None without.

    Raises:
        UnknownModel: if it is no number that a version can have.
    """
    text = request.path_params.get("version")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) >= 1):
        raise UnknownModel(f"A version must be a whole number from 1. Received: {short(text)}.")
    return int(text)


def found(request: Request, service: Service) -> ModelVersion:
    """The version that the path means.

    Raises:
        UnknownModel: if there is none.
    """
    return service.find(request.path_params["model"], version_of(request))


def signature_of(version: ModelVersion) -> Signature:
    """What the version takes and gives.

    Raises:
        NotReady: if it has never been loaded.
    """
    if version.signature is None:
        why = f": {version.reason}" if version.reason else ""
        raise NotReady(f"Model {version.name!r} version {version.version} is {version.state.value}{why}.")
    return version.signature


async def read(
    request: Request,
    service: Service,
    reading: Offload,
    size: Callable[[Signature], int],
    read_as: Callable[[ModelVersion], T],
) -> T:
    """The request's body as what the version that the path means takes.

    Args:
        request: the client's.
        service: its models.
        reading: reads what is large.
        size: how many bytes of the body take time to read, for a signature.
        read_as: reads it, for a version that has been loaded.

    Raises:
        ClientDisconnect: if the client leaves.
        ServiceError: as `read_as` raises it, or if there is no such version any more.
    """
    while True:
        version = found(request, service)
        signature = signature_of(version)
        call_of(request.scope).version = str(version.version)
        work = functools.partial(read_as, version)
        asked = await at_once_or_offloaded(request, reading, size(signature), work)
        # The newest may be another one now.
        if found(request, service).signatures == version.signatures:
            return asked


async def at_once_or_offloaded(request: Request, offload: Offload, size: int, work: Callable[[], T]) -> T:
    """What the work returns: done at once if it is small, else by the thread, unless the client leaves.

    Raises:
        ClientDisconnect: if it does.
        ServiceError: as the work raises it.
    """
    if size <= LARGE_BYTES:
        return work()
    async with _connected(request):
        return await offload.run(work)


async def infer(
    request: Request,
    service: Service,
    inputs: Mapping[str, np.ndarray],
    timeout: float | None,
    signature: str = DEFAULT_SIGNATURE,
) -> tuple[ModelVersion, dict[str, np.ndarray]]:
    """The service's answer; its work is dropped when the client leaves.

    Raises:
        ClientDisconnect: if it did.
        ServiceError: as the service raises it.
    """
    async with _connected(request):
        name = request.path_params["model"]
        answer = await service.infer(name, version_of(request), inputs, timeout, signature)
        call_of(request.scope).version = str(answer[0].version)
        return answer


@contextlib.asynccontextmanager
async def _connected(request: Request) -> AsyncIterator[None]:
    """Cancels its block when the client leaves, and raises ClientDisconnect."""
    with anyio.CancelScope() as scope:
        watching = asyncio.create_task(_cancel_when_gone(request, scope))
        try:
            yield
        finally:
            watching.cancel()
        return
    raise ClientDisconnect


async def _cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
