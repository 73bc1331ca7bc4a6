"""The Open Inference Protocol, version 2, over REST: requests to arrays, arrays to answers."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdext.common.checks import did_you_mean
from hvdext.serving.protocols import v2_binary
from hvdext.serving.protocols.json_text import in_parts, read_json, require, write_json
from hvdext.serving.protocols.tensors import check_names, check_rows, from_shaped, present, short
from hvdext.serving.service import DEFAULT_SIGNATURE, InvalidRequest, ModelVersion, Signature, TensorSpec

EXTENSIONS = ("binary_tensor_data", "model_repository")

# Parameters that would change the answer; to ignore them would be to give a wrong one.
_REFUSED = (
    "signature_name",
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "shared_memory_region",
    "classification",
)


@dataclass(frozen=True)
class InferRequest:
    """One request to infer.

    Attributes:
        id: comes back with the answer; None without.
        inputs: one array per input of the model.
        outputs: name -> is it asked for in binary? In the order of the answer.
        timeout: seconds; None without.
        in_base64: outputs whose texts are asked for in base 64.
    """

    id: str | None
    inputs: dict[str, np.ndarray]
    outputs: dict[str, bool]
    timeout: float | None
    in_base64: frozenset[str] = frozenset()


def bytes_to_parse(body: bytes, header_length: str | None, signature: Signature) -> int:
    """How much of a body takes time to read; numbers in binary are taken as they are."""
    if header_length is None or any(spec.datatype == "BYTES" for spec in signature.inputs):
        return len(body)
    return len(v2_binary.split(body, header_length)[0])


def read_request(body: bytes, header_length: str | None, version: ModelVersion) -> InferRequest:
    """A request's body, checked against the model.

    Args:
        body: without its encoding.
        header_length: the header `Inference-Header-Content-Length`; None without.
        version: what is asked; it has been loaded.

    Raises:
        InvalidRequest: if anything does not fit.
    """
    model, signature = version.name, version.signatures[DEFAULT_SIGNATURE]
    text, binary = v2_binary.split(body, header_length)
    if header_length is not None and not text:
        return _read_raw(binary, model, signature)
    request = require(read_json(text), dict, "The request")
    parameters = _parameters(request, "the request")
    inputs, rest = _read_inputs(request, binary, model, signature, _is_base64(parameters))
    if rest:
        raise InvalidRequest(
            f"The inputs' `binary_data_size` must add up to the {len(binary)} bytes behind the JSON. "
            f"Received: {len(binary) - rest}."
        )
    outputs, in_base64 = _read_outputs(request, parameters, signature)
    id_ = request.get("id")
    return InferRequest(
        id=None if id_ is None else require(id_, str, "`id`"),
        inputs=inputs,
        outputs=outputs,
        timeout=_timeout(parameters),
        in_base64=in_base64,
    )


def _read_raw(binary: memoryview, model: str, signature: Signature) -> InferRequest:
    spec = signature.bare
    if spec is None:
        raise InvalidRequest(
            f"A body without JSON is taken by models with one input. Model {model!r} has "
            f"{len(signature.inputs)}."
        )
    array = v2_binary.decode(binary, v2_binary.raw_shape(binary, spec), spec)
    outputs = {output.name: True for output in signature.outputs}
    return InferRequest(id=None, inputs={spec.name: array}, outputs=outputs, timeout=None)


def _read_inputs(
    request: dict, binary: memoryview, model: str, signature: Signature, in_base64: bool
) -> tuple[dict[str, np.ndarray], int]:
    given: dict[str, dict] = {}
    for entry in require(request.get("inputs"), list, "`inputs`"):
        entry = require(entry, dict, "Each of `inputs`")
        name = require(entry.get("name"), str, "The `name` of an input")
        if name in given:
            raise InvalidRequest(f"Input {short(name)} must be there once. Received: twice.")
        given[name] = entry
    check_names(given, signature, model)
    specs = {spec.name: spec for spec in signature.inputs}
    arrays = {}
    for name, entry in given.items():  # in the order of the binary data
        array, binary = _read_input(entry, binary, specs[name])
        own = _parameters(entry, f"input {name!r}")
        decode = _is_base64(own) if own.get("content_type") else in_base64 and array.dtype == object
        arrays[name] = _from_base64(array, specs[name]) if decode else array
    check_rows(arrays)
    return {spec.name: arrays[spec.name] for spec in present(signature, arrays)}, len(binary)


def _read_input(entry: dict, binary: memoryview, spec: TensorSpec) -> tuple[np.ndarray, memoryview]:
    label = f"input {spec.name!r}"
    if entry.get("datatype") != spec.datatype:
        raise InvalidRequest(
            f"The `datatype` of {label} must be {spec.datatype!r}. Received: {short(entry.get('datatype'))}."
        )
    shape = require(entry.get("shape"), list, f"The `shape` of {label}")
    if set(map(type, shape)) - {int}:
        raise InvalidRequest(f"The `shape` of {label} must be whole numbers. Received: {short(shape)}.")
    size = _parameters(entry, label).get("binary_data_size")
    if size is None:
        if "data" not in entry:
            raise InvalidRequest(f"There must be `data` or the parameter `binary_data_size` for {label}.")
        return from_shaped(entry["data"], shape, spec), binary
    if entry.get("data") is not None:
        raise InvalidRequest(f"There must be `data` or `binary_data_size` for {label}. Received: both.")
    if type(size) is not int or not 0 <= size <= len(binary):
        raise InvalidRequest(
            f"`binary_data_size` of {label} must be 0 to {len(binary)}, the bytes behind the JSON, whose "
            f"length the header Inference-Header-Content-Length says. Received: {short(size)}."
        )
    return v2_binary.decode(binary[:size], shape, spec), binary[size:]


def _is_base64(parameters: dict) -> bool:
    """As MLServer's clients say it; its other content types leave the values as they are."""
    return parameters.get("content_type") == "base64"


def _from_base64(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    label = f"input {spec.name!r}"
    if array.dtype != object:
        raise InvalidRequest(
            f"The parameter `content_type` of {label} may be 'base64' for BYTES only. "
            f"Received: an input of {spec.datatype}."
        )
    decoded = np.empty(array.shape, object)
    for place, value in np.ndenumerate(array):
        try:
            decoded[place] = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise InvalidRequest(
                f"The data of {label} must be in base 64, as its `content_type` says. "
                f"Received: {short(value)} ({error})."
            ) from error
    return decoded


def _read_outputs(
    request: dict, parameters: dict, signature: Signature
) -> tuple[dict[str, bool], frozenset[str]]:
    datatypes = {spec.name: spec.datatype for spec in signature.outputs}
    names = [spec.name for spec in signature.outputs]
    binary = parameters.get("binary_data_output")
    all_binary = False if binary is None else require(binary, bool, "The parameter `binary_data_output`")
    asked = request.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(names, all_binary), frozenset()
    outputs, in_base64 = {}, set()
    for entry in require(asked, list, "`outputs`"):
        entry = require(entry, dict, "Each of `outputs`")
        name = require(entry.get("name"), str, "The `name` of an output")
        if name not in names:
            gives, hint = ", ".join(map(repr, names)), did_you_mean(name, names)
            raise InvalidRequest(f"`outputs` must be among {gives}. Received: {short(name)}.{hint}")
        settings = _parameters(entry, f"output {name!r}")
        own = settings.get("binary_data")
        outputs[name] = all_binary if own is None else require(own, bool, "The parameter `binary_data`")
        if _is_base64(settings):
            if datatypes[name] != "BYTES" or outputs[name]:
                form = "binary" if outputs[name] else datatypes[name]
                raise InvalidRequest(
                    f"The parameter `content_type` of output {name!r} may be 'base64' for BYTES in JSON "
                    f"only. Received: {form}."
                )
            in_base64.add(name)
    return outputs, frozenset(in_base64)


def _parameters(holder: dict, label: str) -> dict:
    found = holder.get("parameters")
    found = {} if found is None else require(found, dict, f"The `parameters` of {label}")
    for name in _REFUSED:
        if found.get(name):
            raise InvalidRequest(f"The parameter `{name}` of {label} is not supported by this server.")
    return found


def _timeout(parameters: dict) -> float | None:
    microseconds = parameters.get("timeout")
    if microseconds is None or (type(microseconds) is int and microseconds == 0):
        return None
    if type(microseconds) is not int or microseconds < 0:
        raise InvalidRequest(
            "The parameter `timeout` must be a whole number of microseconds, 0 for the server's own limit. "
            f"Received: {short(microseconds)}."
        )
    return microseconds / 1e6


def bytes_to_write(request: InferRequest, outputs: Mapping[str, np.ndarray]) -> int:
    """How much of an answer takes time to write."""
    arrays = [outputs[name] for name, binary in request.outputs.items() if not binary]
    return sum(array.nbytes for array in arrays)


def write_answer(
    request: InferRequest, version: ModelVersion, signature: Signature, outputs: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the bytes of JSON it begins with; None if all of it is JSON.

    Raises:
        InvalidRequest: if bytes are asked for as JSON that are no UTF-8.
    """
    datatypes = {spec.name: spec.datatype for spec in signature.outputs}
    entries = []
    tail: list[bytes | memoryview] = []
    for name, binary in request.outputs.items():
        array = outputs[name]
        entry: dict[str, Any] = {"name": name, "datatype": datatypes[name], "shape": list(array.shape)}
        if binary:
            tail.append(v2_binary.encode(array))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            in_base64 = name in request.in_base64
            entry["data"] = _flat_json(name, _to_base64(array) if in_base64 else array)
            if in_base64:
                entry["parameters"] = {"content_type": "base64"}
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": version.name, "model_version": str(version.version)}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"] = entries
    head = write_json(answer)
    return (b"".join([head, *tail]), len(head)) if tail else (head, None)


def _to_base64(array: np.ndarray) -> np.ndarray:
    encoded = np.empty(array.size, object)
    encoded[:] = [base64.b64encode(value) for value in array.flat]
    return encoded


def _flat_json(name: str, array: np.ndarray) -> Any:
    if array.dtype != object:
        return in_parts(array.reshape(-1))
    try:
        return in_parts([value.decode() for value in array.flat])
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"Output {name!r} holds bytes that are no UTF-8, which JSON cannot hold: ask for it with the "
            "parameter `binary_data`: true, or `content_type`: 'base64'."
        ) from error


def metadata(version: ModelVersion, signature: Signature, versions: list[int]) -> dict[str, Any]:
    """What `GET /v2/models/{model}` answers; `versions` are the numbers of all its versions."""
    return {
        "name": version.name,
        "versions": [str(number) for number in versions],
        "platform": version.platform,
        "inputs": [_tensor(spec) for spec in signature.inputs],
        "outputs": [_tensor(spec) for spec in signature.outputs],
        "parameters": {"requests_together": not signature.alone, "reason": signature.alone},
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if length is None else length for length in spec.shape]
    found = {"name": spec.name, "datatype": spec.datatype, "shape": shape}
    return {**found, "parameters": {"optional": True}} if spec.optional else found
