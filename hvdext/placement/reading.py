"""Reads a Keras model: its layers' calls, nested models flattened, and from them the `Graph` of a plan."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common import global_state

from hvdext.optimizer import innermost
from hvdext.placement.costs import flops_of, kept_inside
from hvdext.placement.deferred import without_values
from hvdext.placement.graph import Graph, Layer, Tensor

# Keras' lists of how often each name is taken, and of variables without a value.
_NUMBERS = "object_name_uids"


@dataclass(frozen=True)
class Call:
    """One call of a layer, or of an operation without weights.

    Attributes:
        path: the layer's path, the same for all its calls.
        operation: the Keras layer or operation.
        node: Keras' record of the call: its arguments, with symbolic tensors in them, and its outputs.
        inputs: names of the tensors that it takes, one for each of `node.arguments.keras_tensors`.
        outputs: names of the tensors that it returns, one for each of `node.outputs`.
        context: what the nested models around it have been called with, such as `training=False`.
    """

    path: str
    operation: Any
    node: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    context: Mapping[str, Any] = field(default_factory=dict)

    def run(self, values: dict[str, Any], **context: Any) -> None:
        """Calls the operation and adds what it returns to `values`.

        Args:
            values: tensors by name; must hold `inputs`.
            **context: `training` and other arguments for those operations that take them. As in Keras, what
                is given here and not None goes before what the model's layers have been called with.
        """
        tensors = zip(self.node.arguments.keras_tensors, self.inputs, strict=True)
        args, kwargs = self.node.arguments.fill_in({id(tensor): values[name] for tensor, name in tensors})
        known = getattr(self.operation, "_call_context_args", {})
        given = {**self.context, **{k: v for k, v in context.items() if v is not None}}
        kwargs.update((k, v) for k, v in given.items() if k in known)
        results = keras.tree.flatten(self.operation(*args, **kwargs))
        values.update(zip(self.outputs, results, strict=True))


@dataclass(frozen=True)
class Calls:
    """A model as calls of its layers.

    Attributes:
        model: the Keras model.
        inputs: names of the tensors that go in, in the model's order; those are the input layers' paths.
        calls: in an order in which they can be run.
        outputs: names of the tensors that come out, in the model's order.
    """

    model: keras.Model
    inputs: tuple[str, ...]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]


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


def skeleton(builder: Callable[[], keras.Model]) -> keras.Model:
    """The model that `builder` returns, whose variables have shapes but no values and take no memory.

    Keras' numbering of names stands as it did before: the next model from the same builder has the same
    names.

    Raises:
        TypeError: if `builder` returns something else than a model.
    """
    return unallocated(builder)[0]


def unallocated(builder: Callable[[], keras.Model]) -> tuple[keras.Model, keras.StatelessScope]:
    """As `skeleton`, and the scope that holds what `builder` has assigned, such as weights from a file."""
    numbers = dict(global_state.get_global_attribute(_NUMBERS, {}))
    try:
        with without_values() as scope:
            model = builder()
    finally:
        global_state.set_global_attribute(_NUMBERS, collections.defaultdict(int, numbers))
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a function that returns a Keras model. Received: {model!r}.")
    return model, scope


def calls_of(model: keras.Model) -> Calls:
    """The calls of a model's layers, nested Sequential and functional models flattened.

    Raises:
        TypeError: if it is no Keras model.
        ValueError: if it cannot be read.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a Keras model, or a function without arguments that returns one. "
            f"Received: {model!r}."
        )
    function = function_of(model)
    if function is None:
        raise ValueError(_unreadable(model))
    inputs = tuple(tensor._keras_history.operation.name for tensor in function.inputs)
    reader = _Reader()
    outputs = reader.walk(function, "", inputs, {})
    return Calls(model, inputs, tuple(reader.calls), tuple(outputs))


def function_of(operation) -> keras.Function | None:
    """The graph that Keras runs where `operation` is a Sequential or functional model, else None.

    A class of the user's that has a `call` of its own does something else than that graph.
    """
    if not isinstance(operation, keras.Model) or not is_kerass_own(type(operation), "call"):
        return None
    if isinstance(operation, keras.Sequential):
        return operation._functional
    return operation if isinstance(operation, keras.Function) else None


def inputs_like(function: keras.Function) -> Any:
    """New inputs for a copy of a graph, of the same structure and with the names of its input layers.

    `keras.models.clone_model` names them after the tensors, which have other names where the user gave none.
    A `Sequential` model makes its own: None.
    """
    if isinstance(function, keras.Sequential):
        return None

    def like(tensor):
        layer = tensor._keras_history.operation
        return type(layer).from_config(layer.get_config()).output

    return keras.tree.map_structure(like, function._inputs_struct)


def is_kerass_own(cls: type, method: str) -> bool:
    """Whether a model's class has `method` from Keras, and not from the user."""
    owner = next(base for base in cls.__mro__ if method in vars(base))
    return owner.__module__.split(".")[0] == "keras"


class _Reader:
    """Walks through nested graphs and writes the calls down."""

    def __init__(self):
        self.calls: list[Call] = []
        self._paths: dict[int, str] = {}  # by the operation's id: a shared one keeps its first path
        self._times: dict[str, int] = {}  # calls so far, by path

    def walk(self, function, prefix: str, inputs: Sequence[str], context: Mapping[str, Any]) -> list[str]:
        """Adds the calls of `function`, and returns the names of its outputs.

        Args:
            function: the graph.
            prefix: the path of the model that it belongs to, with a "/" at the end.
            inputs: names of the tensors that it is called on.
            context: what it has been called with.
        """
        names = {id(tensor): name for tensor, name in zip(function.inputs, inputs, strict=True)}
        for node in _nodes(function):
            taken = tuple(names[id(tensor)] for tensor in node.arguments.keras_tensors)
            names.update(zip(map(id, node.outputs), self._outputs(node, prefix, taken, context), strict=True))
        return [names[id(tensor)] for tensor in function.outputs]

    def _outputs(self, node, prefix, taken, context) -> Sequence[str]:
        operation = node.operation
        path = self._paths.setdefault(id(operation), prefix + operation.name)
        nested = function_of(operation)
        given = None if nested is None else _inputs_of(nested, node, taken)
        if nested is not None and given is not None:
            return self.walk(nested, path + "/", given, _context_of(node, context))
        time = self._times.get(path, 0)
        self._times[path] = time + 1
        base = f"{path}@{time}" if time else path
        outputs = tuple(f"{base}:{i}" if i else base for i in range(len(node.outputs)))
        self.calls.append(Call(path, operation, node, taken, outputs, context))
        return outputs


def _inputs_of(nested, node, taken: Sequence[str]) -> list[str] | None:
    """Names of the tensors in the order of `nested`'s inputs; None if it is called in an unusual way."""
    arguments = node.arguments
    given = arguments.args[0] if arguments.args else arguments.kwargs.get("inputs")
    if isinstance(given, dict) and not isinstance(nested._inputs_struct, dict):
        given = [given.get(tensor.name) for tensor in nested.inputs]
    flat = keras.tree.flatten(given)
    if len(flat) != len(nested.inputs) or len(taken) != len(flat):  # an optional input, or a mask beside it
        return None
    names = {id(tensor): name for tensor, name in zip(arguments.keras_tensors, taken, strict=True)}
    return [names[id(tensor)] for tensor in flat]


def _context_of(node, outer: Mapping[str, Any]) -> Mapping[str, Any]:
    own = {k: v for k, v in node.arguments.kwargs.items() if k != "inputs" and v is not None}
    return {**own, **outer}


def _nodes(function) -> Iterator[Any]:
    """The calls in `function`, a branch at a time: each after those that it depends on."""
    given = {id(tensor) for tensor in function.inputs}
    done: set[int] = set()
    for output in function.outputs:
        stack = [(output, False)]
        while stack:
            tensor, is_ready = stack.pop()
            if id(tensor) in given:
                continue
            history = tensor._keras_history
            node = history.operation._inbound_nodes[history.node_index]
            if id(node) in done:
                continue
            if is_ready:
                done.add(id(node))
                yield node
            else:
                stack.append((tensor, True))
                stack.extend((source, False) for source in reversed(node.arguments.keras_tensors))


# -- from calls to a graph --------------------------------------------------------------------------------


def _graph(calls: Calls) -> Graph:
    function = function_of(calls.model)
    assert function is not None, "calls_of refuses such a model"
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
    target = innermost(model.optimizer)
    return max(map(_slots_of, getattr(target, "optimizers", [target])))


def _slots_of(optimizer) -> int:
    twin = type(optimizer).from_config(optimizer.get_config())
    twin.build([keras.Variable(tf.zeros((2, 3)), name="sample")])
    return sum(tuple(variable.shape) == (2, 3) for variable in twin.variables)


def is_builder(model: Any) -> bool:
    """Whether `model` is a function that returns one."""
    return callable(model) and not isinstance(model, keras.Model)


def _unreadable(model) -> str:
    name = f"{type(model).__name__} {model.name!r}"
    if isinstance(model, keras.Sequential):
        return (
            f"`model` must be built, so that its shapes are known: begin it with keras.Input(...), or call "
            f"model.build((None, ...)). Received: the Sequential model {model.name!r}, which is not."
        )
    return (
        "`model` must be a Sequential or functional model: the order of a subclassed model's layers stands "
        "in Python code, which cannot be read. Give its layers as a functional model, keras.Model(inputs, "
        "outputs), where each is called on what another returns; a layer of your own may stay as it is and "
        f"is placed as a whole. Received: {name}."
    )
