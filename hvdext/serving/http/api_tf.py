"""The endpoints of TensorFlow Serving's REST, and what KServe's first protocol has besides."""

from __future__ import annotations

import functools

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
from hvdext.serving.http.offload import Offload
from hvdext.serving.http.paths import MODEL, VERSION
from hvdext.serving.http.request_metrics import call_of
from hvdext.serving.protocols import tf_serving
from hvdext.serving.service import Service


def routes(service: Service, bodies: Bodies, reading: Offload, writing: Offload) -> list[Route]:
    """The protocol's routes; `reading` and `writing` are for what is large."""
    api = _TensorFlowServing(service, bodies, reading, writing)
    table: list[tuple[str, str, Endpoint]] = [("/v1/models", "GET", api.models)]
    for path in (f"/v1/models/{MODEL}", f"/v1/models/{MODEL}{VERSION}"):
        table += [
            (path, "GET", api.status),
            (path + "/metadata", "GET", api.metadata),
            (path + ":predict", "POST", api.predict),
        ]
    return route_table(table)


class _TensorFlowServing(Endpoints):
    async def models(self, _: Request) -> Response:
        names = {version.name for version in self._service.versions()}
        return JSONResponse({"models": sorted(names)})

    async def status(self, request: Request) -> Response:
        version = found(request, self._service)
        if "version" in request.path_params:
            return JSONResponse(tf_serving.status([version]))
        versions = [other for other in self._service.versions() if other.name == version.name]
        return JSONResponse(tf_serving.status(versions))

    async def metadata(self, request: Request) -> Response:
        version = found(request, self._service)
        signature_of(version)  # refuses what has never been loaded
        return JSONResponse(tf_serving.metadata(version))

    async def predict(self, request: Request) -> Response:
        call = call_of(request.scope)
        call.protocol = "tensorflow-serving"
        call.model = found(request, self._service).name  # an unknown one is refused before its body is read
        async with self._bodies.read(request) as body:
            asked = await read(
                request,
                self._service,
                self._reading,
                lambda signature: len(body),
                functools.partial(tf_serving.read_request, body),
            )
            version, outputs = await infer(
                request, self._service, asked.inputs, timeout=None, signature=asked.signature
            )
        signature = version.signatures[asked.signature]
        work = functools.partial(tf_serving.write_answer, asked.rows, signature, outputs)
        size = sum(array.nbytes for array in outputs.values())
        text = await at_once_or_offloaded(request, self._writing, size, work)
        return Response(text, media_type="application/json")
