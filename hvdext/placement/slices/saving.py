"""A cut model's whole weights: to a file that plain Keras opens, and from one, at any number of ranks."""

from __future__ import annotations

import os

import keras
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.failures import raise_for, told
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.custom_objects import custom_objects_of, fresh_copy
from hvdext.keras_tools.derived import settle
from hvdext.keras_tools.functional import is_functional
from hvdext.keras_tools.models import flat_layers, retrace
from hvdext.keras_tools.optimizers import build
from hvdext.keras_tools.slice_marks import Slice, cut_axis
from hvdext.keras_tools.vocabularies import take_along
from hvdext.placement.slices.layer import SlicedLayer
from hvdext.placement.slices.operators import joined
from hvdext.placement.slices.uncut import compile_alike, uncut_clone

_WEIGHTS = ".weights.h5"


@suggests_keywords
def save_uncut(model: keras.Model, filepath: str | os.PathLike) -> None:
    """Writes the uncut model, as plain Keras would have saved it; neither hvdext nor Horovod opens it.

    Every rank calls it; one writes, and all return once the file is there. Where the model is compiled, a
    `.keras` file holds the optimizer with its whole state, the loss and the metrics. The writing rank holds
    the whole model meanwhile.

    Args:
        model: functional or `Sequential`, with cut layers made by `hvd.slice_layers` or directly.
        filepath: ends with `.keras`, or with `.weights.h5` for the weights only.

    Raises:
        ValueError: if `filepath` ends otherwise, or `model` is a subclassed model; on every rank alike, if
            Keras cannot save what `model` is compiled with.
        OSError: on every rank alike, if the file cannot be written.
        RuntimeError: on every rank alike, if Keras fails in another way.
    """
    path = _checked_path(filepath)
    _require_twin(model)
    comm = _group_of(model)
    error = None
    # The other groups along a data axis hold the same, and wait.
    if comm.ranks[0] == 0:
        try:
            twin = _gathered(comm, model)
            if twin is not None:
                twin.save_weights(path) if path.endswith(_WEIGHTS) else twin.save(path)
        except Exception as problem:  # the other ranks wait, and must hear of it
            error = problem
    # Rank 0 writes. Its group waits for it; along a data axis, `current()` then tells the other groups.
    heard = None if error is None else told(error)
    for among, name in ((comm, "hvdext.slices.saved.slices"), (current(), "hvdext.slices.saved.everywhere")):
        heard = next(filter(None, among.allgather_object(heard, name)), None)
    raise_for([0], [heard], f"hvd.save_uncut could not write {path!r}", error)


@suggests_keywords
def load_uncut(model: keras.Model, filepath: str | os.PathLike) -> None:
    """Gives a cut model its slices of what a file of the uncut model holds, saved by plain Keras or hvdext.

    Every rank calls it and reads the file by itself, holding the whole model meanwhile. If both the file and
    `model` have an optimizer of the same class, its state is taken over too. Random generators go on as they
    are: files of Keras do not hold their states.

    Args:
        model: functional or `Sequential`, with cut layers, for any number of ranks.
        filepath: a `.keras` or `.weights.h5` file.

    Raises:
        ValueError: if `filepath` ends otherwise; on every rank alike, if a rank cannot read it, or it holds
            another model.
    """
    path = _checked_path(filepath)
    _require_twin(model)
    comm = _group_of(model)
    try:
        source, problem = _read(model, path), None
    except Exception as error:  # the other ranks, whose files may be fine, must hear of it
        source, problem = None, f"`filepath` must be a file that Keras reads. Received: {path!r}: {error}"
    agreement.check(comm, "hvd.load_uncut", {}, problem)
    optimizer, read = getattr(model, "optimizer", None), getattr(source, "optimizer", None)
    own, theirs = list(model.weights), list(source.weights)
    if optimizer is not None and read is not None and type(optimizer) is type(read) and read.built:
        build(optimizer, model.trainable_variables)
        own, theirs = [*own, *optimizer.variables], [*theirs, *read.variables]
    agreement.check(comm, "hvd.load_uncut", {}, _difference(path, own, theirs, comm.size))
    for variable, value in zip(own, theirs, strict=True):
        axis = cut_axis(variable.shape, value.shape)
        whole = tf.convert_to_tensor(value)
        variable.assign(whole if axis is None else Slice(axis, comm.rank, comm.size).of(whole))
    settle(model)
    if take_along(source, model):
        retrace(model)


def _read(model, path):
    if not path.endswith(_WEIGHTS):
        with custom_objects_of(model):
            return keras.saving.load_model(path, compile=model.compiled)
    twin = _twin(model, compiled=False)
    twin.load_weights(path)
    return twin


def _checked_path(filepath):
    path = os.fspath(filepath)
    if not path.endswith((".keras", _WEIGHTS)):
        raise ValueError(f"`filepath` must end with .keras or {_WEIGHTS}. Received: filepath={path!r}.")
    return path


def _require_twin(model):
    if not is_functional(model):
        raise ValueError(
            "`model` must be a functional or Sequential Keras model, whose uncut twin can be made. "
            f"Received: {model.name!r} of type {type(model).__name__}."
        )


def _group_of(model) -> Communicator:
    layers = flat_layers(model, include_self=False)
    return next((layer.comm for layer in layers if isinstance(layer, SlicedLayer)), None) or current()


# -- the uncut twin -----------------------------------------------------------------------------------


def _twin(model, compiled):
    """The model of plain Keras that `model` is a cut of, with weights of its own."""
    twin = uncut_clone(model)
    if compiled and model.compiled:
        optimizer = None if model.optimizer is None else fresh_copy(model.optimizer)
        compile_alike(twin, model, optimizer)
        if optimizer is not None and model.optimizer.built:
            build(twin.optimizer, twin.trainable_variables)
    return twin


def _state(model) -> list:
    """Weights and the optimizer's state, in an order that a model shares with its twin.

    Without the states of random generators, which Keras' files do not hold either.
    """
    optimizer = getattr(model, "optimizer", None)
    return [*model.weights, *(optimizer.variables if optimizer is not None else [])]


def _gathered(comm, model) -> keras.Model | None:
    """The twin with all values on the group's first rank, None on the others; all of the group call it."""
    twin, error = None, None
    if comm.rank == 0:
        try:
            twin = _twin(model, compiled=True)
        except Exception as problem:  # settings that Keras cannot save; the others wait
            error = problem
    targets = _state(twin) if twin is not None else []
    shapes = None if error is not None else [tuple(v.shape) for v in targets]
    shapes = comm.broadcast_object(shapes, 0, "hvdext.slices.shapes")
    if error is not None:
        raise error
    if shapes is None:
        return None
    for i, (variable, shape) in enumerate(zip(_state(model), shapes, strict=True)):
        value = tf.convert_to_tensor(variable)
        axis = cut_axis(value.shape, shape)
        if axis is not None:
            # A name for each number of axes: functions traced for several know no shape at all.
            value = joined(comm, value, axis, f"hvdext.slices.whole.{len(shape)}")
        if targets:
            targets[i].assign(value)
    return twin


def _difference(path, own, theirs, count):
    """What is wrong with the variables of a file, None if they fit."""
    if len(own) != len(theirs):
        return (
            "`filepath` must hold the uncut model. "
            f"Received: {path!r} with {len(theirs)} variables for {len(own)}."
        )
    for variable, value in zip(own, theirs, strict=True):
        try:
            axis = cut_axis(variable.shape, value.shape)
        except ValueError:
            axis = -1
        if axis is not None and (axis < 0 or variable.shape[axis] * count != value.shape[axis]):
            return (
                "`filepath` must hold the uncut model. "
                f"Received: {path!r} with {value.path} of shape {tuple(value.shape)}, of which "
                f"{tuple(variable.shape)} is no slice among {count}."
            )
    return None
