"""Reads a Keras model: its layers' calls, nested models flattened, and from them the `Graph` of a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdext.keras_tools.custom_objects import fresh_copy
from hvdext.keras_tools.functional import Call, Calls, calls_of, is_builder, required_function_of, skeleton
from hvdext.keras_tools.optimizers import updaters_of
from hvdext.placement.plan.costs import flops_of, kept_inside
from hvdext.placement.plan.graph import Graph, Layer, Tensor


def read(model: keras.Model | Callable[[], keras.Model]) -> Graph:
    """The `Graph` of a model, for a plan.

    Args:
        model: a built Sequential or functional model, or a function that returns one, which is then built
            without allocating its weights.

    Raises:
        TypeError: if it is neither.
        ValueError: if it cannot be read: a subclassed model with a `call` of its own, or one without shapes.
    """
    return _graph(calls_of(skeleton(model) if is_builder(model) else model))


# -- from calls to a graph --------------------------------------------------------------------------------


def _graph(calls: Calls) -> Graph:
    function = required_function_of(calls.model)
    batch = function.inputs[0].shape[0] if function.inputs[0].shape else None
    made: dict[str, tuple[str, Any]] = {}  # producer and symbolic tensor by name
    takers: dict[str, dict[str, None]] = {}
    for name, tensor in zip(calls.inputs, function.inputs, strict=True):
        made[name] = (name, tensor)
    for call in calls.calls:
        for name in call.inputs:
            takers.setdefault(name, {})[call.path] = None
        made.update((name, (call.path, kt)) for name, kt in zip(call.outputs, call.node.outputs, strict=True))
    tensors = tuple(
        Tensor(name, path, tuple(takers.get(name, {})), tuple(kt.shape), kt.dtype, _bytes(kt, batch))
        for name, (path, kt) in made.items()
    )
    by_path: dict[str, list[Call]] = {}
    for call in calls.calls:
        by_path.setdefault(call.path, []).append(call)
    owners: dict[int, str] = {}
    shared: dict[int, set[str]] = {}
    layers = [Layer(name, "InputLayer", is_input=True) for name in calls.inputs]
    for path, own in by_path.items():
        mine = []
        for variable in getattr(own[0].operation, "variables", []):
            if owners.setdefault(id(variable), path) == path:
                mine.append(variable)
            else:
                shared.setdefault(id(variable), {owners[id(variable)]}).add(path)
        layers.append(_layer(path, own, mine, batch))
    groups = sorted({tuple(sorted(paths)) for paths in shared.values()})
    return Graph(calls.model.name, tuple(layers), tensors, calls.outputs, tuple(groups), _slots(calls.model))


def _layer(path: str, calls: Sequence[Call], variables: Sequence, batch: int | None) -> Layer:
    operation = calls[0].operation
    weights = {id(weight) for weight in getattr(operation, "weights", [])}
    shapes = [_shapes(call, batch) for call in calls]
    return Layer(
        path=path,
        kind=type(operation).__name__,
        parameters=sum(math.prod(v.shape) for v in variables if id(v) in weights),
        weight_bytes=sum(map(_variable_bytes, variables)),
        trainable_bytes=sum(_variable_bytes(v) for v in variables if v.trainable),
        activation_bytes=sum(_bytes(t, batch) for call in calls for t in call.node.outputs)
        + sum(kept_inside(operation, taken) for taken, _ in shapes),
        flops=sum(flops_of(operation, *pair) for pair in shapes),
    )


def _shapes(call: Call, batch: int | None) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of one sample, of what a call takes and returns; unknown axes are one."""
    taken, returned = call.node.arguments.keras_tensors, call.node.outputs
    return [_sample(t, batch) for t in taken], [_sample(t, batch) for t in returned]


def _sample(tensor, batch: int | None) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if shape and shape[0] == batch:
        shape = shape[1:]
    return tuple(1 if axis is None else axis for axis in shape)


def _bytes(tensor, batch: int | None) -> int:
    return math.prod(_sample(tensor, batch)) * tf.as_dtype(tensor.dtype).size


def _variable_bytes(variable) -> int:
    return math.prod(variable.shape) * tf.as_dtype(variable.dtype).size


def _slots(model) -> int | None:
    """How many variables of its shape the model's optimizer keeps for a trained variable."""
    if getattr(model, "optimizer", None) is None:
        return None
    return max(map(_slots_of, updaters_of(model.optimizer)))


def _slots_of(optimizer) -> int:
    twin = fresh_copy(optimizer)
    twin.build([keras.Variable(tf.zeros((2, 3)), name="sample")])
    return sum(tuple(variable.shape) == (2, 3) for variable in twin.variables)
