"""`slice_layers`: a cut model out of an uncut one, or out of the function that builds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.grid import Grid, slices_of
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.deferred import first_value
from hvdext.keras_tools.derived import derive_anew
from hvdext.keras_tools.functional import (
    clone,
    inputs_like,
    is_builder,
    is_functional,
    is_kerass_own,
    name_alike,
    unallocated,
)
from hvdext.keras_tools.layers import cloned
from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.overrides import overridden
from hvdext.keras_tools.slice_marks import mark_of
from hvdext.keras_tools.vocabularies import lookup_layers, set_vocabulary_of, vocabulary_of
from hvdext.placement.slices.attention import SlicedGroupQueryAttention, SlicedMultiHeadAttention
from hvdext.placement.slices.convolution import SlicedConv2D
from hvdext.placement.slices.dense import ColumnDense, RowDense
from hvdext.placement.slices.dropout import SlicedDropout
from hvdext.placement.slices.embedding import SlicedEmbedding
from hvdext.placement.slices.layer import SlicedLayer, blank_parts
from hvdext.placement.slices.rules import Cuts, cuts_of


@suggests_keywords
def slice_layers(
    model: keras.Model | Callable[[], keras.Model], rules: Mapping[str, str], grid: Grid | None = None
) -> keras.Model:
    """Cuts layers of a model: each rank keeps its slices of the weights, together they compute what it does.

    Every rank of the group calls it with the same model (by shape) and rules. The weights are those of the
    group's first rank. What comes back is a Keras model with the same name, layers and variables, in the
    same order: `compile`, `fit`, `evaluate`, `predict` work on all ranks together, which must get the same
    samples. Save it by `hvd.save_uncut`.

    Where a layer cut by column (or filters) leads to layers cut by row (or channels) only, with nothing in
    between but layers and activations of Keras that work element by element or channel by channel, its output
    stays cut: the pair then exchanges once forward and once backward. Elsewhere outputs are gathered, also
    where an activation of your own follows: it may look at all units.

    Args:
        model: functional or `Sequential`, also with such models inside, built and not compiled; or a function
            that builds one and returns it: then no rank ever holds the whole model, but for the values that
            the function assigns, such as weights from a file.
        rules: maps patterns on layers' paths ("encoder/up", "*/query") to ways of cutting:

            - a `Dense`: "column", "row", or "vocabulary": by column, the model's output stays cut, for
              `hvd.SlicedSparseCategoricalCrossentropy`.
            - an `Embedding`: "rows" or "columns".
            - a `MultiHeadAttention` or `GroupQueryAttention`: "heads".
            - a `Conv2D`: "filters" or "channels".
        grid: along whose slices; None: those of the surrounding `grid.data_parallel()`, otherwise all ranks.

    Returns:
        The cut model, not compiled.

    Raises:
        TypeError: if `model` is something else, such as a subclassed model; use the layers in its own code.
        ValueError: if it is not built, or compiled; if a pattern matches nothing, a layer cannot be cut that
            way, or the number of slices does not divide what it cuts; on every rank alike, if the ranks'
            models or rules differ.
    """
    comm = slices_of(grid)
    model, scope = _model_of(model)
    shapes = [f"{tuple(v.shape)} {tf.as_dtype(v.dtype).name}" for v in model.variables]
    # A layer that has none of its own on one rank alone would leave the others waiting below.
    kinds = [type(layer).__name__ for layer in lookup_layers(model)]
    facts = {"rules": dict(rules), "variables": shapes, "layers with vocabularies": kinds}
    agreement.check(comm, "hvd.slice_layers", facts)
    cuts = cuts_of(model, rules)
    with blank_parts():
        cut = clone(model, lambda layer: _cut_layer(layer, cuts, comm), inputs_like(model), recursive=True)
    name_alike(model, cut)
    # The names of the exchanges: a rank that has made another Sequential model before has numbered this one.
    paths = [layer.path for layer in flat_layers(cut) if isinstance(layer, SlicedLayer)]
    facts = {"paths of what is cut (name the model and its layers)": paths}
    agreement.check(comm, "hvd.slice_layers", facts, _class_problem(model, cut))
    for source, target in zip(model.variables, cut.variables, strict=True):
        value = first_value(source, scope) if comm.rank == 0 else tf.zeros(source.shape, source.dtype)
        (value,) = comm.broadcast([value], 0, "hvdext.slices.weights")
        marked = mark_of(target)
        target.assign(value if marked is None else marked[0].of(value))
    derive_anew([cut])
    _hand_on_vocabularies(comm, cut)
    return cut


def _model_of(model):
    """The uncut model, and the scope that holds what its builder has assigned."""
    scope = keras.StatelessScope()
    if is_builder(model):
        model, scope = unallocated(model)
    if not is_functional(model):
        raise TypeError(
            "`model` must be a functional or Sequential Keras model, or a function that builds one. In a "
            "subclassed model use hvd.ColumnDense, hvd.RowDense and the other cut layers directly. "
            f"Received: model={model!r} of type {type(model).__name__}."
        )
    if not model.built:
        raise ValueError(
            f"`model` must be built: begin it with a keras.Input. Received: the unbuilt {model.name!r}."
        )
    if model.compiled:
        raise ValueError(
            "`model` must not be compiled: compile the cut model. "
            f"Received: {model.name!r}, compiled with {model.optimizer.name!r}."
        )
    return model, scope


def _class_problem(model, cut) -> str | None:
    """What the models in `model` do in their own way, and the plain ones that Keras makes of some do not."""
    models = (filter(is_functional, flat_layers(one)) for one in (model, cut))
    for one, copy in zip(*models, strict=True):
        is_plain = type(copy) is not type(one)
        changed = overridden(one, by_class=is_plain) if one is model else []
        if is_plain and not is_kerass_own(type(one), "call"):
            changed = [*changed, f"{type(one).__name__}.call"]
        if changed:
            return (
                "`model` must be of a class that Keras can make anew of layers, or have all its methods from "
                "Keras: with a constructor of its own, or derived from Sequential, it becomes a plain one. "
                f"Received: {type(one).__name__} {one.name!r} with {', '.join(changed)}. Use the cut layers "
                "(hvd.ColumnDense, ...) in its own code."
            )
    return None


def _hand_on_vocabularies(comm, model):
    layers = lookup_layers(model)
    if not layers:
        return
    contents = comm.broadcast_object(list(map(vocabulary_of, layers)), 0, "hvdext.slices.vocabularies")
    for layer, content in zip(layers, contents, strict=True):
        set_vocabulary_of(layer, content)


def _cut_layer(layer: keras.layers.Layer, cuts: Cuts, comm) -> keras.layers.Layer:
    """The layer that takes the place of `layer`, without its weights."""
    key = id(layer)
    way, takes, leaves = cuts.ways.get(key), key in cuts.taken, key in cuts.left
    kind = type(layer)
    ours: dict[str, object] = {}
    if way in ("column", "vocabulary"):
        kind, ours = ColumnDense, {"gather": not leaves}
    elif way == "row":
        kind, ours = RowDense, {"sliced_input": takes}
    elif way in ("rows", "columns"):
        kind, ours = SlicedEmbedding, {"cut": way}
    elif way in ("filters", "channels"):
        kind, ours = SlicedConv2D, {"cut": way, "gather": not leaves, "sliced_input": takes}
    elif way == "heads":
        grouped = kind is keras.layers.GroupQueryAttention
        kind = SlicedGroupQueryAttention if grouped else SlicedMultiHeadAttention
    elif key in cuts.between and kind is keras.layers.Dropout:
        kind = SlicedDropout
    if kind is type(layer):
        return cloned(layer)
    return kind(**layer.get_config(), **ours, grid=comm)
