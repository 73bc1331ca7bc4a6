"""A functional model read as the calls of its layers, and built without values."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras.src.backend.common import global_state

from hvdext.keras_tools.deferred import rename, without_values
from hvdext.keras_tools.layers import cloned
from hvdext.keras_tools.models import flat_layers

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


def is_functional(model: Any) -> bool:
    """Whether `model` is a Sequential or functional Keras model, or of a class derived from them."""
    return isinstance(model, keras.Sequential) or (
        isinstance(model, keras.Model) and isinstance(model, keras.Function)
    )


def graph_of(model: keras.Model) -> keras.Function:
    """The graph of a Sequential or functional model that is built."""
    return model._functional if isinstance(model, keras.Sequential) else model


def nodes_of(function: keras.Function) -> list[Any]:
    """Keras' records of the calls in a graph, without those in nested models."""
    return [node for depth in function._nodes_by_depth.values() for node in depth]


def function_of(operation) -> keras.Function | None:
    """The graph that Keras runs where `operation` is a Sequential or functional model, else None.

    A class of the user's that has a `call` of its own does something else than that graph.
    """
    if not isinstance(operation, keras.Model) or not is_kerass_own(type(operation), "call"):
        return None
    return graph_of(operation) if is_functional(operation) else None


def required_function_of(model: keras.Model) -> keras.Function:
    """As `function_of`, of a model that `calls_of` has read."""
    function = function_of(model)
    assert function is not None, "calls_of refuses such a model"
    return function


def with_open_batch(model: keras.Model) -> keras.Model:
    """A Sequential model for batches of any size, where it was built on the batch it was first called with.

    Keras then keeps that batch's size in the file. Other models are returned as they are, and so is one whose
    layers need to know the size, such as a stateful RNN.
    """
    function = function_of(model) if isinstance(model, keras.Sequential) else None
    if function is None or len(function.inputs) != 1 or function.inputs[0].shape[0] is None:
        return model
    if any(getattr(layer, "stateful", False) for layer in flat_layers(model)):
        return model
    (tensor,) = function.inputs
    start = keras.Input((*tensor.shape[1:],), dtype=tensor.dtype, name=tensor._keras_history.operation.name)
    return keras.Sequential([start, *model.layers], name=model.name)


def standardized(function: keras.Function, inputs: Any) -> list[Any]:
    """The tensors that a graph is called on, in its order, of what its model is given.

    Args:
        function: the graph.
        inputs: in whatever structure Keras takes them, such as a dict by name.
    """
    return function._standardize_inputs(inputs)


def outputs_like(function: keras.Function, tensors: Sequence[Any]) -> Any:
    """Outputs in the structure in which a functional model returns them.

    Args:
        function: the model's graph.
        tensors: one for each of `function.outputs`.
    """
    outputs = keras.tree.pack_sequence_as(function._outputs_struct, tensors)
    is_one = isinstance(outputs, (list, tuple)) and len(outputs) == 1
    return outputs[0] if is_one else outputs


def rebuilt(function: keras.Function, inputs: Any, operation_fn: Callable[[Any], Any]) -> Any:
    """The outputs of a graph called on other inputs, with other operations in it.

    Args:
        function: the graph.
        inputs: symbolic tensors in the structure of the graph's own, as from `inputs_like`.
        operation_fn: gives for each operation the one that takes its place.
    """
    return function._run_through_graph(inputs, operation_fn=operation_fn)


def clone(
    model: keras.Model, clone_layer: Callable[[Any], Any], inputs: Any = None, *, recursive: bool = False
) -> keras.Model:
    """As `keras.models.clone_model`, but never compiled: Keras would compile the clone as the model is.

    Args:
        model: Sequential or functional.
        clone_layer: gives for each layer the one that takes its place.
        inputs: of the clone, as from `inputs_like`; None: Keras makes them.
        recursive: whether nested models are cloned layer by layer, too.
    """
    was_compiled, model.compiled = model.compiled, False
    try:
        return keras.models.clone_model(model, inputs, clone_layer, recursive=recursive)
    finally:
        model.compiled = was_compiled


def name_alike(source: keras.Model, target: keras.Model) -> None:
    """Gives a copy of a model the names that the model has, where Keras has numbered anew.

    Args:
        source: a Sequential or functional model.
        target: with the same layers, operations and variables in the same order, of whatever classes.
    """
    models = (filter(is_functional, flat_layers(one)) for one in (source, target))
    for given, own in zip(*models, strict=True):
        own.name = given.name
    for given, own in zip(calls_of(source).calls, calls_of(target).calls, strict=True):
        own.operation.name = given.operation.name
    for given, own in zip(source.variables, target.variables, strict=True):
        rename(own, given.name, given.path)


def inputs_like(function: keras.Function) -> Any:
    """New inputs for a copy of a graph, of the same structure and with the names of its input layers.

    `keras.models.clone_model` names them after the tensors, which have other names where the user gave none.
    A `Sequential` model makes its own: None.
    """
    if isinstance(function, keras.Sequential):
        return None

    def like(tensor):
        return cloned(tensor._keras_history.operation).output

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
