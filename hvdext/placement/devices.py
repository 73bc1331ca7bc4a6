"""`place`: a model whose layers' variables and computation are on the devices of a plan, in one process.

The copy that `place` returns differs from the model in where its layers work, and in nothing else:

    variables  get their values on their device
    forward    each layer runs under its device; what comes from another device is copied there first, once
    backward   each copy's gradient is copied back; everything else runs beside the tensors that it works on
    update     Keras puts optimizer slots and updates beside their variables
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.deferred import give_value, rename
from hvdext.keras_tools.derived import derive_anew
from hvdext.keras_tools.functional import (
    calls_of,
    inputs_like,
    is_builder,
    is_kerass_own,
    rebuilt,
    required_function_of,
    unallocated,
)
from hvdext.keras_tools.layers import cloned, mask_of, set_mask
from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.optimizers import build, keep_gradients_apart, updaters_of
from hvdext.keras_tools.overrides import overridden
from hvdext.keras_tools.train_step import around
from hvdext.placement.plan.plan import Plan

# What no device scope moves: strings stay on the host, handles with what they stand for.
_BOUND = (tf.string, tf.resource, tf.variant)


@suggests_keywords
def place(
    model: keras.Model | Callable[[], keras.Model], plan: Plan, devices: Sequence[str] | None = None
) -> keras.Model:
    """Copies `model` so that each layer's variables and computation are where `plan` says.

    The copy has the same names, weights and outputs. `fit`, `evaluate`, `predict` and `save` work, the saved
    file opens in plain Keras, and `set_weights(get_weights())` goes both ways. It is not compiled: compile
    it as any model, also with `hvd.DistributedOptimizer`.

    Args:
        model: a Sequential or functional model, built, which stays as it is; or a function that returns one:
            then there are no weights but the copy's.
        plan: a plan for it, from `hvd.plan`; its places are the devices.
        devices: one for each place, such as `["/GPU:0", "/GPU:1"]`; several places may have the same. None:
            the machine's GPUs if there are enough, else its (logical) CPUs.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if the plan is for another model, there are not enough devices or one does not exist, or
            the model cannot be copied.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a plan, from hvd.plan(model, places). Received: plan={plan!r}.")
    model, scope = unallocated(model) if is_builder(model) else (model, None)
    calls = calls_of(model)
    plan.check(model)
    names = _checked(devices, plan.places)
    device_of = {id(call.operation): names[plan.place_of(call.path)] for call in calls.calls}
    _require_told(model)
    copier = _Copier(device_of)
    with tf.device("/CPU:0"):  # a model may be larger than any other device
        placed = copier.copy(model)
    _copy_state(model, placed, copier, scope)
    _bring_once(placed)
    _keep_gradients_beside(placed)
    return placed


def _checked(devices, places: int) -> list[str]:
    """The devices' full names, one for each place."""
    there = [device.name for kind in ("GPU", "CPU") for device in tf.config.list_logical_devices(kind)]
    if devices is None:
        for kind in ("GPU", "CPU"):
            found = [device.name for device in tf.config.list_logical_devices(kind)]
            if len(found) >= places:
                return found[:places]
        raise ValueError(
            f"`plan` must have at most as many places as there are devices of one kind. Received: {places} "
            f"places, and there are {there}. Give devices=[...] with one of these for each place, or split a "
            "device with tf.config.set_logical_device_configuration(...) before TensorFlow's first operation."
        )
    if not isinstance(devices, (list, tuple)) or not all(isinstance(device, str) for device in devices):
        raise TypeError(
            f"`devices` must be a list of names, one for each place. Received: devices={devices!r}."
        )
    if len(devices) != places:
        raise ValueError(
            f"`devices` must hold one device for each of the {places} places. Received: devices={devices!r}."
        )
    found = []
    for device in devices:
        matches = [name for name in there if _key(name) == _key(device)]
        if not matches:
            raise ValueError(f"`devices` must hold some of {there}. Received: {device!r}.")
        found.append(matches[0])
    return found


@functools.lru_cache
def _key(device: str) -> tuple[str | None, int | None]:
    """What tells two devices of one process apart, however much of the name is spelled out."""
    try:
        spec = tf.DeviceSpec.from_string(device)
    except ValueError:
        return (None, None)
    return (spec.device_type, spec.device_index or 0) if spec.device_type else (None, None)


# -- the copy ---------------------------------------------------------------------------------------------


class _Copier:
    """Copies models layer by layer, each layer once."""

    def __init__(self, device_of: Mapping[int, str]):
        self.device_of = device_of
        self.copies: dict[int, tuple[Any, Any]] = {}  # original and copy, by the original's id

    def copy(self, operation: Any) -> Any:
        """The copy of a layer, an operation or a model."""
        if id(operation) not in self.copies:
            copied = self._layer(operation) if id(operation) in self.device_of else self._model(operation)
            self.copies[id(operation)] = operation, copied
        return self.copies[id(operation)][1]

    def _model(self, model):
        function = required_function_of(model)
        inputs = inputs_like(function)
        if isinstance(model, keras.Sequential):
            return _made_like(model, [keras.tree.flatten(inputs)[0], *map(self.copy, model.layers)])
        return _made_like(model, inputs, rebuilt(function, inputs, self.copy))

    def _layer(self, operation):
        copied = cloned(operation)
        copied.call = _on(self.device_of[id(operation)], copied.call)
        return copied


def _require_told(model) -> None:
    """Refuses a model that a copy of its layers would train or answer otherwise than it does."""
    has_constructor = not is_kerass_own(type(model), "__init__")
    changed = overridden(model, by_class=has_constructor)
    if changed:
        raise ValueError(
            "`model` must be a plain Sequential or functional model, or of a class without a constructor of "
            "its own, and with its methods in its class: others are not copied. "
            f"Received: {type(model).__name__} {model.name!r}, which has"
            f"{' one, and' if has_constructor else ''} {', '.join(changed)}."
        )


def _made_like(model, *parts) -> keras.Model:
    """A model of the class of `model`; a plain one if the class has a constructor of its own."""
    cls = type(model)
    if is_kerass_own(cls, "__init__"):
        return cls(*parts, name=model.name)
    plain = keras.Sequential if isinstance(model, keras.Sequential) else keras.Model
    return plain(*parts, name=model.name)


def _copy_state(
    model: keras.Model, placed: keras.Model, copier: _Copier, scope: keras.StatelessScope | None
) -> None:
    """Moves the variables of `placed` to their devices and gives them the values of those of `model`."""
    for original, copied in copier.copies.values():
        if id(original) in copier.device_of:
            _copy_variables(original, copied, copier.device_of[id(original)], scope)
    for original, copied in zip(flat_layers(model), flat_layers(placed), strict=True):
        copied.name = original.name  # Keras has numbered anew what a layer makes inside without a name
        copied.trainable = original.trainable  # from the outside in: a model hands its flag on to its layers
    for original, copied in zip(model.variables, placed.variables, strict=True):
        copied.trainable = original.trainable


def _copy_variables(original, copied, device: str, scope) -> None:
    theirs, ours = getattr(original, "variables", []), getattr(copied, "variables", [])
    if [tuple(v.shape) for v in theirs] != [tuple(v.shape) for v in ours]:
        raise ValueError(
            "`model` must hold layers that their `get_config` describes in full, so that they can be copied. "
            f"Received: {type(original).__name__} {original.name!r} with the variables "
            f"{[v.path for v in theirs]}, whose copy has {[v.path for v in ours]}."
        )
    for variable, source in zip(ours, theirs, strict=True):
        value = scope.get_current_value(source) if scope is not None else source.value
        rename(variable, source.name, source.path)
        with tf.device(device):
            # Not `assign`: the variable itself moves. A builder's begins with what the copy has drawn.
            give_value(variable, tf.identity(variable.value if value is None else value))
    if isinstance(copied, keras.Layer):
        derive_anew([copied])


# -- where computation goes -------------------------------------------------------------------------------


class _Visits(threading.local):
    """What has been brought to which device during the present call of a model; None outside of one.

    Original and copy, by the original's id and the device.
    """

    copies: dict[tuple[int, str], tuple[Any, Any]] | None = None


_visits = _Visits()


def _bring_once(model: keras.Model) -> None:
    """Lets all layers on a device share one copy of a tensor, and of its gradient, in a call of `model`."""
    call = model.call

    @functools.wraps(call)
    def with_visits(*args, **kwargs):
        # Not longer than a call: another tape would not know of the copy.
        outer, _visits.copies = _visits.copies, {}
        try:
            return call(*args, **kwargs)
        finally:
            _visits.copies = outer

    model.call = with_visits


def _on(device: str, call: Callable) -> Callable:
    """`call`, on `device`, with its inputs brought there."""

    @functools.wraps(call)
    def on_device(*args, **kwargs):
        args, kwargs = keras.tree.map_structure(lambda x: _brought(x, device), (args, kwargs))
        with tf.device(device):
            return call(*args, **kwargs)

    return on_device


def _brought(x: Any, device: str) -> Any:
    """`x` on `device`, if it is a tensor that can be there; its gradient goes back to where `x` is."""
    if not isinstance(x, tf.Tensor) or x.dtype in _BOUND or _key(x.device) == _key(device):
        return x
    copies = {} if _visits.copies is None else _visits.copies
    if (id(x), device) not in copies:
        there = _moved(x, device) if x.dtype.is_floating and x.device else _copied(x, device)
        mask = mask_of(x)
        if mask is not None:
            set_mask(there, mask)
        copies[id(x), device] = x, there
    return copies[id(x), device][1]


def _moved(x: tf.Tensor, device: str) -> tf.Tensor:
    source = x.device

    @tf.custom_gradient
    def move(x):
        return _copied(x, device), lambda gradient: _copied(gradient, source)

    return move(x)


def _copied(x: tf.Tensor, device: str) -> tf.Tensor:
    with tf.device(device):
        return tf.identity(x)


def _keep_gradients_beside(model: keras.Model) -> None:
    """Makes the backward pass and the updates of `fit` run where their layers are."""

    def beside(step):
        @functools.wraps(step)
        def train_step(data):
            if model.optimizer is not None:
                _prepare(model.optimizer, model.trainable_variables)
            if tf.executing_eagerly():
                return step(data)
            with beside_inputs():
                return step(data)

        return train_step

    around(model, beside)
    model.supports_jit = False  # one XLA cluster is on one device


def _prepare(optimizer, variables) -> None:
    """Makes `optimizer`'s variables beside those of the model, and lets gradients stay where they are."""
    # Keras would make them while it traces a step, where TensorFlow forgets whom they should be beside.
    with tf.init_scope():
        build(optimizer, variables)
    for member in updaters_of(optimizer):
        keep_gradients_apart(member)


def beside_inputs():
    """While it is entered in a `tf.function`, operations without a device go where their largest input is.

    `fit` does so by itself. In a loop of your own the backward pass of a placed model would run on
    TensorFlow's default device, since its tape knows nothing of devices:

        @tf.function
        def step(x, y):
            with beside_inputs():
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean(loss_of(y, placed(x, training=True)))
                optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
    """
    graph = tf.compat.v1.get_default_graph()
    handles: dict[int, tf.Tensor] = {}

    def device_of(tensor) -> str:
        if tensor.device:
            return tensor.device
        if tensor.dtype == tf.resource:
            if id(tensor) not in handles:  # a variable's handle, as the function sees it
                captures = getattr(tensor.graph, "captures", ())
                handles.update((id(inside), outside) for outside, inside in captures)
            return device_of(handles[id(tensor)]) if id(tensor) in handles else ""
        # A read has no device of its own; it happens where the variable is.
        return device_of(tensor.op.inputs[0]) if tensor.op.type == "ReadVariableOp" else ""

    def choose(operation) -> str:
        if operation.device or not operation.inputs:
            return operation.device
        return device_of(max(operation.inputs, key=lambda tensor: (bool(device_of(tensor)), _weight(tensor))))

    return graph.device(choose)


def _weight(tensor) -> float:
    """Elements that would have to move; a variable cannot."""
    elements = tensor.shape.num_elements()
    return math.inf if tensor.dtype == tf.resource or elements is None else elements
