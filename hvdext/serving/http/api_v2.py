"""The endpoints of the Open Inference Protocol, version 2, with its repository extension."""

from __future__ import annotations

import functools
import importlib.metadata

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from hvdext.serving.http.bodies import Bodies
from hvdext.serving.http.errors import JSONResponse
from hvdext.serving.http.handlers import (
    Endpoint,
    Endpoints,
    at_once_or_offloaded,
    found,
    infer,
    read,
    route_table,
    signature_of,
)
from hvdext.serving.http.offload import LARGE_BYTES, Offload
from hvdext.serving.http.paths import MODEL, VERSION
from hvdext.serving.http.request_metrics import call_of
from hvdext.serving.protocols import v2, v2_binary
from hvdext.serving.protocols.json_text import read_json, require
from hvdext.serving.protocols.tensors import short
from hvdext.serving.service import InvalidRequest, Service, State


def routes(service: Service, bodies: Bodies, reading: Offload, writing: Offload) -> list[Route]:
    """The protocol's routes; `reading` and `writing` are for what is large."""
    api = _V2(service, bodies, reading, writing)
    table: list[tuple[str, str, Endpoint]] = [
        ("/v2", "GET", api.server),
        ("/v2/health/live", "GET", api.live),
        ("/v2/health/ready", "GET", api.ready),
    ]
    for path in (f"/v2/models/{MODEL}", f"/v2/models/{MODEL}{VERSION}"):
        table += [
            (path, "GET", api.metadata),
            (path + "/ready", "GET", api.model_ready),
            (path + "/infer", "POST", api.infer),
        ]
    table += [
        ("/v2/repository/index", "POST", api.index),
        (f"/v2/repository/models/{MODEL}/load", "POST", api.load),
        (f"/v2/repository/models/{MODEL}/unload", "POST", api.unload),
    ]
    return route_table(table)


class _V2(Endpoints):
    async def server(self, _: Request) -> Response:
        return JSONResponse(
            {
                "name": "hvdext",
                "version": importlib.metadata.version("hvdext"),
                "extensions": list(v2.EXTENSIONS),
            }
        )

    async def live(self, _: Request) -> Response:
        live = self._service.live
        return JSONResponse({"live": live}, 200 if live else 503)

    async def ready(self, _: Request) -> Response:
        ready = self._service.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def metadata(self, request: Request) -> Response:
        version = found(request, self._service)
        versions = [other.version for other in self._service.versions() if other.name == version.name]
        return JSONResponse(v2.metadata(version, signature_of(version), versions))

    async def model_ready(self, request: Request) -> Response:
        version = found(request, self._service)
        ready = version.state is State.READY
        return JSONResponse({"name": version.name, "ready": ready}, 200 if ready else 503)

    async def infer(self, request: Request) -> Response:
        call = call_of(request.scope)
        header_length = request.headers.get(v2_binary.HEADER_LENGTH)
        call.protocol = "v2" if header_length is None else "v2-binary"
        call.model = found(request, self._service).name  # an unknown one is refused before its body is read
        async with self._bodies.read(request) as body:
            asked = await read(
                request,
                self._service,
                self._reading,
                functools.partial(v2.bytes_to_parse, body, header_length),
                functools.partial(v2.read_request, body, header_length),
            )
            version, outputs = await infer(request, self._service, asked.inputs, asked.timeout)
        work = functools.partial(v2.write_answer, asked, version, signature_of(version), outputs)
        size = v2.bytes_to_write(asked, outputs)
        answer, json_length = await at_once_or_offloaded(request, self._writing, size, work)
        if json_length is None:
            return Response(answer, media_type="application/json")
        headers = {"Inference-Header-Content-Length": str(json_length)}
        return Response(answer, headers=headers, media_type="application/octet-stream")

    async def index(self, request: Request) -> Response:
        settings = await self._settings(request)
        ready = settings.get("ready")
        only_ready = False if ready is None else require(ready, bool, "`ready`")
        known = {(version.name, version.version): version for version in self._service.versions()}
        entries = []
        for name, number in sorted({*known, *self._service.repository()}):
            version = known.get((name, number))
            state, reason = (version.state, version.reason) if version else (State.UNAVAILABLE, "not loaded")
            if state is State.READY or not only_ready:
                entries.append({"name": name, "version": str(number), "state": state.value, "reason": reason})
        return JSONResponse(entries)

    async def load(self, request: Request) -> Response:
        for name in _parameters(await self._settings(request)):
            raise InvalidRequest(f"Loading takes no parameters. Received: {short(name)}.")
        await self._service.load(request.path_params["model"])
        return JSONResponse({})

    async def unload(self, request: Request) -> Response:
        parameters = _parameters(await self._settings(request))
        for name in parameters:
            if name not in ("version", "unload_dependents"):
                raise InvalidRequest(f"Unloading takes the parameter `version`. Received: {short(name)}.")
        require(parameters.get("unload_dependents", False), bool, "`unload_dependents`")
        version = parameters.get("version")
        if version is not None and (type(version) is not int or version < 1):
            raise InvalidRequest(f"`version` must be a whole number from 1. Received: {short(version)}.")
        await self._service.unload(request.path_params["model"], version)
        return JSONResponse({})

    async def _settings(self, request: Request) -> dict:
        """The body's object; no body is an empty one. None needs to be so large that it takes time."""
        async with self._bodies.read(request, LARGE_BYTES) as body:
            return require(read_json(body), dict, "The body") if body else {}


def _parameters(settings: dict) -> dict:
    parameters = settings.get("parameters")
    return {} if parameters is None else require(parameters, dict, "`parameters`")
