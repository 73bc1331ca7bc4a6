"""A stage of a model, read from a `.keras` file: the process holds no other layers' weights.

The file's model is built without values and cut by `hvd.plan`. Only the layers of the stage get variables,
and only their values are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from hvdext.keras_tools import saving
from hvdext.keras_tools.deferred import give_value, has_value
from hvdext.keras_tools.functional import Calls, calls_of, unallocated, with_open_batch
from hvdext.placement.pipeline.stages import Chunk, Stage, cut
from hvdext.placement.plan.planner import plan
from hvdext.serving.worker.signatures import Port, keras_ports, port


@dataclass(frozen=True)
class StageOfModel:
    """One stage; called with a list of tensors, it returns one.

    Attributes:
        model: the whole model, of whose variables only those of the stage have values.
        layers: the stage.
        takes: what enters it: at the first stage the model's inputs.
        gives: what leaves it: at the last the model's outputs.
        model_ports: what the whole model takes and gives.
        places: of each output of the last stage, its place among what the stage makes.
    """

    model: keras.Model
    layers: Stage
    takes: tuple[Port, ...]
    gives: tuple[Port, ...]
    model_ports: tuple[list[Port], list[Port]]
    places: tuple[int, ...]

    def __call__(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """What leaves the stage."""
        made = self.layers(list(tensors), training=False)
        return [made[place] for place in self.places]


def load_stage(path: str | os.PathLike, number: int, stages: int) -> StageOfModel:
    """Stage `number`, 0 to `stages` - 1, of the model in a `.keras` file.

    Raises:
        ValueError: if the model cannot be read or cut into so many stages, or the file does not fit it.
    """
    if not 0 <= number < stages:
        raise ValueError(f"`stage` must lie in 0 to {stages - 1}. Received: stage={number!r}.")
    file = os.fspath(path)
    model, _ = unallocated(lambda: with_open_batch(saving.uncompiled_model(file)))
    ports = _ports(model)
    calls = calls_of(model)
    chunk = cut(calls, plan(model, places=stages))[number]
    stage = Stage(chunk)
    own = {id(call.operation) for call in chunk.calls}
    foreign = [call.operation for call in calls.calls if id(call.operation) not in own]
    _read_weights(file, model, stage, foreign)
    saving.read_assets(model, file, foreign)
    if number == 0:
        ports = _ports(model)  # now that their vocabularies are there
    return _with_names(stage, calls, ports, is_first=number == 0, is_last=number == stages - 1)


def _ports(model: keras.Model) -> tuple[list[Port], list[Port]]:
    """What the model takes and gives; all of it, since tensors that may be missing cannot travel."""
    takes, gives = keras_ports(model)
    return [replace(one, spec=replace(one.spec, optional=False)) for one in takes], gives


def _read_weights(file: str, model: keras.Model, stage: Stage, foreign: Sequence[Any]) -> None:
    """Gives the stage's variables their values in the file, and those without one there their first."""
    # Values are noted, not copied into others that stand there already.
    with keras.StatelessScope(initialize_variables=False) as scope:
        saving.read_weights(model, file, foreign)
    for variable in stage.variables:
        value = scope.get_current_value(variable)
        if value is not None or not has_value(variable):  # the state of a random generator has none
            give_value(variable, value)


def _with_names(stage: Stage, calls: Calls, ports, is_first: bool, is_last: bool) -> StageOfModel:
    takes = tuple(ports[0]) if is_first else _crossing(stage.chunk, "takes")
    if not is_last:
        gives = _crossing(stage.chunk, "gives")
        return StageOfModel(calls.model, stage, takes, gives, ports, tuple(range(len(gives))))
    # An output that the model gives twice leaves the stage once; masks stay inside.
    made = [None if parcel.is_mask else parcel.name for parcel in stage.chunk.gives]
    places = tuple(made.index(name) for name in calls.outputs)
    return StageOfModel(calls.model, stage, takes, tuple(ports[1]), ports, places)


def _crossing(chunk: Chunk, side: str) -> tuple[Port, ...]:
    """Tensors between two stages, called as the layers that make them."""
    return tuple(
        port(f"{parcel.name}/mask" if parcel.is_mask else parcel.name, parcel.spec.dtype, parcel.spec.shape)
        for parcel in getattr(chunk, side)
    )
