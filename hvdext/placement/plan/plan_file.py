"""A plan as a YAML file: one line for each layer and each tensor, so that a user can move a layer by hand."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hvdext.config import yaml_file
from hvdext.config.call import Target
from hvdext.config.position import Position, shown, suggestion
from hvdext.config.reading import Reader
from hvdext.placement.plan.assignment import BALANCES, Assignment
from hvdext.placement.plan.graph import Graph, Layer, Tensor

_READER = Reader()


def write(plan: Assignment, path: str | os.PathLike) -> None:
    """Writes `plan` to the file at `path`."""
    graph = plan.graph
    data = {
        "model": graph.name,
        "places": plan.places,
        "balance": plan.balance,
        "batch_size": plan.batch_size,
        "slots": plan.slots,
        "crossing": plan.crossing,
        "layers": {
            path: yaml_file.Line(place=plan.assignment[path], **_told(layer, "path"))
            for path, layer in graph.by_path.items()
        },
        "tensors": {tensor.name: yaml_file.Line(_told(tensor, "name")) for tensor in graph.tensors},
        "outputs": list(graph.outputs),
        "shared": [list(group) for group in graph.shared],
        "optimizer_slots": graph.slots,
    }
    yaml_file.write(data, path)


def read(path: str | os.PathLike) -> Assignment:
    """The plan in the file at `path`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no plan.
    """
    position = Position(os.fspath(path))
    call = _READER.call(Target("plan", _plan, given=("position",)), yaml_file.read(path), position)
    return call.make(position=position)


def _told(item: Layer | Tensor, without: str) -> dict[str, Any]:
    """The fields that are not their defaults, as a file writes them."""
    fields = [field for field in dataclasses.fields(item) if field.name != without]
    values = {field.name: getattr(item, field.name) for field in fields}
    told = {f.name: values[f.name] for f in fields if values[f.name] != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}


def _plan(
    position: Position,
    model: str,
    places: int,
    balance: str,
    batch_size: int,
    slots: int,
    crossing: float,
    layers: Mapping[str, Any],
    tensors: Mapping[str, Any],
    outputs: Sequence[str],
    shared: Sequence[Sequence[str]],
    optimizer_slots: int | None = None,
) -> Assignment:
    if balance not in BALANCES:
        raise position.key("balance").error(f"there is no {shown(balance)}. {suggestion(balance, BALANCES)}")
    stages: list[list[str]] = [[] for _ in range(places)]
    found = []
    for path, item in _items(layers, position.key("layers")):
        at = position.key("layers").key(path)
        place, layer = _READER.call(Target("layer", _layer, given=("path",)), item, at).make(path=path)
        if not 0 <= place < places:
            raise at.key("place").error(f"`place` must lie in 0 to {places - 1}. Received: place={place}.")
        stages[place].append(path)
        found.append(layer)
    read_tensors = []
    for name, item in _items(tensors, position.key("tensors")):
        at = position.key("tensors").key(name)
        tensor = _READER.call(Target("tensor", _tensor, given=("name",)), item, at).make(name=name)
        for path in (tensor.producer, *tensor.consumers):
            if path not in layers:
                raise at.error(f"{path!r} must be one of `layers`. {suggestion(path, layers)}")
        read_tensors.append(tensor)
    graph = Graph(
        model,
        tuple(found),
        tuple(read_tensors),
        tuple(outputs),
        tuple(map(tuple, shared)),
        optimizer_slots,
    )
    return Assignment(graph, tuple(map(tuple, stages)), balance, batch_size, slots, crossing)


def _layer(
    path: str,
    place: int,
    kind: str,
    parameters: int = 0,
    weight_bytes: int = 0,
    trainable_bytes: int = 0,
    activation_bytes: int = 0,
    flops: int = 0,
    seconds: float = 0.0,
    is_input: bool = False,
) -> tuple[int, Layer]:
    sizes = (parameters, weight_bytes, trainable_bytes, activation_bytes, flops, seconds)
    return place, Layer(path, kind, *sizes, is_input=is_input)


def _tensor(
    name: str,
    producer: str,
    consumers: Sequence[str],
    shape: Sequence[int | None],
    dtype: str,
    bytes: int,
) -> Tensor:
    return Tensor(name, producer, tuple(consumers), tuple(shape), dtype, bytes)


def _items(data: Mapping[str, Any], position: Position):
    if not isinstance(data, Mapping):
        raise position.error(f"it must be a mapping. Received: {shown(data)}.")
    return data.items()
