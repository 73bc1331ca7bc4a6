"""Which layer is cut how, and where cut activations may stay cut: decided before anything is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import keras

from hvdext.common.checks import did_you_mean
from hvdext.keras_tools.functional import graph_of, is_functional, nodes_of
from hvdext.placement.slices.layer import is_elementwise

L = keras.layers

# How a layer of each class can be cut.
WAYS: dict[type, tuple[str, ...]] = {
    L.Dense: ("column", "row", "vocabulary"),
    L.Embedding: ("rows", "columns"),
    L.MultiHeadAttention: ("heads",),
    L.GroupQueryAttention: ("heads",),
    L.Conv2D: ("filters", "channels"),
}
_OPENS = ("column", "filters")  # what leaves parts, if all of it goes ...
_CLOSES = ("row", "channels")  # ... to what takes parts
# What treats each unit or channel (the last axis) by itself. Dropout gets the mask of its part.
_BETWEEN = (
    L.Activation,
    L.ReLU,
    L.LeakyReLU,
    L.ELU,
    L.Identity,
    L.Dropout,
    L.MaxPooling2D,
    L.AveragePooling2D,
    L.GlobalMaxPooling2D,
    L.GlobalAveragePooling2D,
    L.UpSampling2D,
    L.ZeroPadding2D,
    L.Cropping2D,
)
# Activations that work element by element, among those of Keras. Of a user's own nobody can tell.
# fmt: off
_ELEMENTWISE = (
    "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh",
    "leaky_relu", "linear", "log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink",
    "softplus", "softsign", "sparse_plus", "sparse_sigmoid", "squareplus", "tanh", "tanh_shrink", "threshold",
)
# fmt: on


@dataclass
class Cuts:
    """What becomes of a model's layers, by their identity (`id`).

    Attributes:
        ways: how layers are cut.
        left: layers whose output stays cut.
        taken: layers whose input is cut.
        between: layers that work on what is cut.
    """

    ways: dict[int, str] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    between: set[int] = field(default_factory=set)


def cuts_of(model: keras.Model, rules: Mapping[str, str]) -> Cuts:
    """Applies `rules` to the layers of a functional or `Sequential` model.

    Args:
        model: built.
        rules: as in `slice_layers`.

    Raises:
        ValueError: as in `slice_layers`.
    """
    layers = layers_by_path(model)
    cuts = Cuts()
    chosen: dict[int, tuple[str, str]] = {}
    for pattern, way in rules.items():
        for path, layer in _matching(pattern, layers).items():
            _require_way(pattern, way, path, layer)
            earlier, other = chosen.setdefault(id(layer), (pattern, way))
            if other != way:
                raise ValueError(
                    f"`rules` must cut a layer in one way. Received: {earlier!r}: {other!r} and "
                    f"{pattern!r}: {way!r} for {path!r}."
                )
    cuts.ways = {key: way for key, (_, way) in chosen.items()}
    graphs = list(_functional_parts(model))
    for graph in graphs:
        _keep_parts(graph, cuts)
    _require_logits(graphs[0], layers, cuts)
    return cuts


def layers_by_path(model: keras.Model, prefix: str = "") -> dict[str, keras.layers.Layer]:
    """The layers of a model and of the models in it, by paths such as "encoder/dense_1"."""
    found: dict[str, keras.layers.Layer] = {}
    for layer in model.layers:
        if is_functional(layer):
            found |= layers_by_path(layer, f"{prefix}{layer.name}/")
        elif not isinstance(layer, L.InputLayer):
            found[prefix + layer.name] = layer
    return found


def _matching(pattern, layers):
    found = {path: layer for path, layer in layers.items() if fnmatchcase(path, pattern)}
    if not found:
        hint = did_you_mean(pattern, layers) or f" The model has {list(layers)}."
        raise ValueError(f"`rules` must match at least one layer each. Received: {pattern!r}.{hint}")
    return found


def _require_way(pattern, way, path, layer):
    ways = WAYS.get(type(layer), ())
    if way in ways:
        return
    if ways:
        raise ValueError(
            f"`rules` must cut a {type(layer).__name__} by {' or '.join(map(repr, ways))}. "
            f"Received: {pattern!r}: {way!r} for {path!r}."
        )
    kinds = ", ".join(kind.__name__ for kind in WAYS)
    raise ValueError(
        f"`rules` must name layers that can be cut: {kinds}. Received: {pattern!r}: {way!r} for {path!r} of "
        f"type {type(layer).__name__}; use the layers of hvdext.placement.slices in a class of your own."
    )


def _functional_parts(model):
    """The functional graphs in a model: its own and those of the models in it."""
    yield graph_of(model)
    for layer in model.layers:
        if is_functional(layer):
            yield from _functional_parts(layer)


def _require_logits(graph, layers, cuts):
    """Refuses to cut by "vocabulary" what gives anything but the model's output."""
    outputs = {id(tensor) for tensor in keras.tree.flatten(graph.outputs)}
    nodes = nodes_of(graph)
    used = {id(tensor) for node in nodes for tensor in node.input_tensors}
    good = {
        id(node.operation)
        for node in nodes
        if id(node.outputs[0]) in outputs - used and _can_leave_parts(node.operation)
    }
    for path, layer in layers.items():
        if cuts.ways.get(id(layer)) == "vocabulary" and id(layer) not in good:
            raise ValueError(
                "`rules` must cut by 'vocabulary' a layer of the model itself that gives its output only, "
                f"with an activation element by element. Received: 'vocabulary' for {path!r}."
            )


def _keep_parts(model, cuts):
    """Finds the layers of one graph between which nothing needs to be gathered."""
    nodes = nodes_of(model)
    consumers: dict[int, list] = {}
    for node in nodes:
        for tensor in node.input_tensors:
            consumers.setdefault(id(tensor), []).append(node)
    calls = {id(op): sum(node.operation is op for node in nodes) for op in model.operations}
    outputs = {id(tensor) for tensor in keras.tree.flatten(model.outputs)}

    def follow(tensor):
        """(layers between, layers at the end) of all paths from a cut tensor; None if one is in the way."""
        if id(tensor) in outputs:
            return None
        between, ends = [], []
        for node in consumers.get(id(tensor), []):
            layer = node.operation
            if calls[id(layer)] > 1:
                return None
            if cuts.ways.get(id(layer)) in _CLOSES:
                ends.append(layer)
                continue
            further = follow(node.outputs[0]) if _treats_units_alone(layer) else None
            if further is None:
                return None
            between += [layer, *further[0]]
            ends += further[1]
        return between, ends

    for node in nodes:
        layer = node.operation
        if cuts.ways.get(id(layer)) == "vocabulary":
            cuts.left.add(id(layer))
        if cuts.ways.get(id(layer)) not in _OPENS or calls[id(layer)] > 1 or not _surely_leaves_parts(layer):
            continue
        found = follow(node.outputs[0])
        if found is not None and found[1]:
            cuts.left.add(id(layer))
            cuts.between |= {id(one) for one in found[0]}
            cuts.taken |= {id(one) for one in found[1]}


def _can_leave_parts(layer):
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    elementwise = is_elementwise(getattr(layer, "activation", None))
    # An operation such as `a + b` has none, nor an activation: it is no layer.
    return last and elementwise and getattr(layer, "activity_regularizer", None) is None


def _surely_leaves_parts(layer):
    """Stricter: for parts that nobody has asked for."""
    return _can_leave_parts(layer) and _is_known_elementwise(getattr(layer, "activation", None))


def _treats_units_alone(layer):
    return type(layer) in _BETWEEN and _surely_leaves_parts(layer)


def _is_known_elementwise(activation):
    if isinstance(activation, keras.layers.Layer):
        return _treats_units_alone(activation)
    known = (getattr(keras.activations, name, None) for name in _ELEMENTWISE)
    return activation is None or any(activation is one for one in known)
