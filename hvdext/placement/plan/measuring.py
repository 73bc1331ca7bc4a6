"""How long each layer takes on this machine, forward and backward, for `balance="measured"`."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdext.keras_tools.functional import Call, calls_of, is_builder
from hvdext.placement.plan.graph import Graph

_REPEATS = 7


def measured(model: keras.Model, graph: Graph, samples: Any, batch_size: int) -> Graph:
    """`graph` with the time that each layer takes for a forward and a backward pass, in seconds.

    The median of several runs, less what an empty run takes. Calls of equal layers on equal shapes are timed
    once. The model's weights and statistics stay as they are.

    Args:
        model: a built Keras model.
        graph: what has been read of it.
        samples: a batch of inputs, as the model takes them; None: made up from the inputs' shapes.
        batch_size: samples that are made up.

    Raises:
        TypeError: if `model` is a function that returns one.
        ValueError: if `samples` do not fit the inputs, or must be given.
    """
    if is_builder(model):
        raise TypeError(
            '`model` must be a built model for balance="measured": its layers run. Received: a function.'
        )
    calls = calls_of(model)
    values = dict(zip(calls.inputs, _batch(model, samples, batch_size), strict=True))
    trained = {id(variable) for variable in model.trainable_variables}
    kept = [(v, v.numpy()) for v in model.variables if id(v) not in trained]  # statistics and random states
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, float] = {}
    try:
        empty = _time(tf.function(lambda: tf.constant(0.0)))
        for call in calls.calls:
            twins = _key(call, values)
            if twins not in times:
                times[twins] = max(0.0, _time(_pass(call, values)) - empty)
            seconds[call.path] += times[twins]
            call.run(values, training=False)
    finally:
        for variable, value in kept:
            variable.assign(value)
    layers = [dataclasses.replace(layer, seconds=seconds[layer.path]) for layer in graph.layers]
    return dataclasses.replace(graph, layers=tuple(layers))


def _batch(model, samples, batch_size: int) -> list[tf.Tensor]:
    """One tensor for each input of the model, in its order."""
    if samples is None:
        return [_made_up(tensor, batch_size) for tensor in model.inputs]
    if isinstance(samples, dict):
        missing = [tensor.name for tensor in model.inputs if tensor.name not in samples]
        if missing:
            raise ValueError(f"`samples` must hold every input. Received: none for {missing}.")
        samples = [samples[tensor.name] for tensor in model.inputs]
    given = keras.tree.flatten(samples)
    if len(given) != len(model.inputs):
        raise ValueError(
            f"`samples` must hold one array for each of the model's {len(model.inputs)} inputs. "
            f"Received: {len(given)}."
        )
    found = []
    for array, tensor in zip(given, model.inputs, strict=True):
        array = tf.cast(tf.convert_to_tensor(array), tensor.dtype)
        if not tf.TensorShape(tensor.shape).is_compatible_with(array.shape):
            raise ValueError(
                f"`samples` must have the inputs' shapes. Received: shape {tuple(array.shape)} for "
                f"{tensor.name!r}, which has {tensor.shape}."
            )
        found.append(array)
    return found


def _made_up(tensor, batch_size: int) -> tf.Tensor:
    shape = [tensor.shape[0] or batch_size, *tensor.shape[1:]]
    dtype = tf.as_dtype(tensor.dtype)
    if None in shape or dtype == tf.string:
        raise ValueError(
            "`samples` must be given where an input's shape is not known, or it is text. "
            f"Received: samples=None, and {tensor.name!r} has shape {tensor.shape} and dtype {tensor.dtype}."
        )
    if dtype.is_floating:
        return tf.random.stateless_normal(shape, seed=(1, 2), dtype=dtype)
    return tf.zeros(shape, dtype)


def _key(call: Call, values: dict[str, tf.Tensor]) -> str:
    """Equal for calls that do the same work."""
    operation = call.operation
    settings = (
        operation.get_config() if isinstance(operation, keras.Layer) else {"only": call.node.operation.name}
    )
    settings = {name: value for name, value in settings.items() if name != "name"}
    shapes = [(tuple(values[name].shape), values[name].dtype.name) for name in call.inputs]
    arguments = [call.node.arguments.args, call.node.arguments.kwargs, call.context]
    return json.dumps([type(operation).__name__, settings, shapes, arguments], default=_without_name)


def _without_name(value: Any) -> str:
    return f"<{tuple(value.shape)}>" if isinstance(value, keras.KerasTensor) else repr(value)


def _pass(call: Call, values: dict[str, tf.Tensor]) -> Callable:
    """A function that runs `call` forward and backward once."""
    given = {name: values[name] for name in call.inputs}
    weights = [v.value for v in getattr(call.operation, "trainable_variables", [])]

    @tf.function
    def step(given):
        local = dict(given)
        with tf.GradientTape() as tape:
            watched = [tensor for tensor in given.values() if tensor.dtype.is_floating]
            tape.watch(watched)
            call.run(local, training=True)
            results = [local[name] for name in call.outputs]
        floating = [tensor for tensor in results if tensor.dtype.is_floating]
        if not floating or not watched + weights:
            return results
        return results, tape.gradient(floating, watched + weights)

    return lambda: step(given)


def _time(run: Callable) -> float:
    """Median time of `run`, in seconds, after a first time that does not count."""
    run()
    times = []
    for _ in range(_REPEATS):
        tf.test.experimental.sync_devices()
        start = time.perf_counter()
        run()
        tf.test.experimental.sync_devices()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
