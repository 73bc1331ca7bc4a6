"""`load_model`: a saved model goes on training, with its optimizer distributed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np

from hvdext.collectives.compression import Compression
from hvdext.common.arguments import suggests_keywords
from hvdext.common.log import warn
from hvdext.gradients.optimizer import DistributedOptimizer
from hvdext.keras_tools.optimizers import build


@suggests_keywords
def load_model(
    filepath: str | os.PathLike | h5py.File,
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Compression = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Loads a Keras model whose optimizer then combines its gradients over the ranks.

    The optimizer has the class, settings and state (iterations, slots, loss scale) it was saved with; of an
    `.h5` file, too, where `keras.models.load_model` loses the slots and cannot train on. Every rank reads the
    file by itself.

    Args:
        filepath: a `.keras` or `.h5` file, or an `h5py.File` that is open on a file on disk.
        custom_optimizers: optimizer classes of your own that the file may name.
        custom_objects: other classes and functions that the file may name, by name.
        compression: as for `hvd.DistributedOptimizer`, whose other arguments have their defaults; to set
            them, use `keras.models.load_model` and `hvd.DistributedOptimizer(model.optimizer, ...)`.
        legacy_opts: must be False: Keras 3 has no legacy optimizers.

    Returns:
        The compiled model. A model that was saved without an optimizer comes back as it is, with a
        warning: compile it with `hvd.DistributedOptimizer(...)`.

    Raises:
        TypeError: if `custom_optimizers` holds something that is not a class of Keras 3 optimizers.
        ValueError: if `legacy_opts` is set, the file is in memory only, or Keras cannot read it.
    """
    if legacy_opts:
        raise ValueError(
            "`legacy_opts` must be False: Keras 3 has no legacy optimizers. Load the model with "
            "`keras.models.load_model(filepath, compile=False)` and compile it with "
            "`hvd.DistributedOptimizer(keras.optimizers....)`. Received: legacy_opts=True."
        )
    objects = {cls.__name__: cls for cls in _checked_optimizers(custom_optimizers)}
    path = _path(filepath)
    if h5py.is_hdf5(path):
        objects = _short_names() | objects
    model = keras.models.load_model(path, custom_objects=objects | dict(custom_objects or {}))
    if getattr(model, "optimizer", None) is None:
        warn(
            "`filepath` holds a model without an optimizer: compile it with hvd.DistributedOptimizer(...) "
            f"before training. Received: filepath={filepath!r}."
        )
        return model
    if h5py.is_hdf5(path):
        _restore_state(model, path)
    DistributedOptimizer(model.optimizer, compression=compression)
    return model


def _short_names():
    """Losses and metrics that Keras writes into `.h5` files by names it does not find again there."""
    short = ("mse", "mae", "mape", "msle", "bce", "kld")
    found = {name: keras.losses.get(name) for name in short}
    return found | {name.upper(): function for name, function in found.items()}


def _restore_state(model, path):
    """Gives the optimizer of an `.h5` file the variables that Keras forgets to make, and their values."""
    with h5py.File(path) as file:
        group = file.get("optimizer_weights")
        values = [] if group is None else [np.asarray(group[name]) for name in _weight_names(group)]
    if len(values) == len(model.optimizer.variables):
        return
    # Keras has built it for no variables at all; it must start anew.
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    build(optimizer, model.trainable_variables)
    shapes = [tuple(variable.shape) for variable in optimizer.variables]
    if [value.shape for value in values] == shapes:
        for variable, value in zip(optimizer.variables, values, strict=True):
            variable.assign(value)
    elif values:
        warn(
            "`filepath` holds an optimizer state of another kind; the optimizer starts anew. "
            f"Received: {len(values)} values for {len(shapes)} variables in {str(path)!r}."
        )
    model.optimizer = optimizer


def _weight_names(group):
    """The names in saved order; a long list is in pieces."""
    if "weight_names" in group.attrs:
        return list(group.attrs["weight_names"])
    pieces = itertools.takewhile(
        group.attrs.__contains__, (f"weight_names{number}" for number in itertools.count())
    )
    return [name for piece in pieces for name in group.attrs[piece]]


def _checked_optimizers(custom_optimizers):
    if custom_optimizers is None:
        return []
    classes = list(custom_optimizers) if isinstance(custom_optimizers, Sequence) else [custom_optimizers]
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, keras.optimizers.Optimizer)):
            raise TypeError(
                "`custom_optimizers` must be a list of subclasses of keras.optimizers.Optimizer. "
                f"Received: {cls!r}."
            )
    return classes


def _path(filepath):
    if not isinstance(filepath, h5py.File):
        return filepath
    if filepath.driver == "core" or not os.path.exists(filepath.filename):
        raise ValueError(
            "`filepath` must be a file on disk; Keras reads it by its name. "
            f"Received: an h5py.File in memory, {filepath.filename!r}."
        )
    if filepath.mode != "r":
        filepath.flush()
    return filepath.filename
