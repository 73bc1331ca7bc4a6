"""What the endpoints of both protocols share: which version is meant, and the service's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import anyio
import numpy as np
from starlette.requests import ClientDisconnect, Request

from hvdext.inference.serving.observing import call_of
from hvdext.inference.serving.service import (
    ModelVersion,
    NotReady,
    Service,
    Signature,
    UnknownModel,
)
from hvdext.inference.serving.tensors import short


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


async def infer(
    request: Request,
    service: Service,
    inputs: Mapping[str, np.ndarray],
    timeout: float | None,
) -> tuple[ModelVersion, dict[str, np.ndarray]]:
    """The service's answer; its work is dropped when the client leaves.

    Raises:
        ClientDisconnect: if it did.
        ServiceError: as the service raises it.
    """
    with anyio.CancelScope() as scope:
        watching = asyncio.create_task(_cancel_when_gone(request, scope))
        try:
            answer = await service.infer(request.path_params["model"], version_of(request), inputs, timeout)
        finally:
            watching.cancel()
        call_of(request.scope).version = str(answer[0].version)
        return answer
    raise ClientDisconnect


async def _cancel_when_gone(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
