"""Files of whole models, as plain Keras writes them: a rank reads its own stage's part of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

from hvdext.keras_tools import saving
from hvdext.keras_tools.deferred import without_values
from hvdext.keras_tools.derived import derive_anew
from hvdext.keras_tools.functional import calls_of
from hvdext.keras_tools.slice_marks import mark_of
from hvdext.keras_tools.slots import is_composed, numbers_in_file, positions_of
from hvdext.placement.slices.uncut import is_cut, uncut_clone

_RULE = "`filepath` must be a file whose model was saved with the state of an optimizer of this kind."


def read_weights(
    model: keras.Model, file: str, is_here: Callable[[str], bool], options: Mapping[str, Any]
) -> None:
    """Gives the layers that are on this rank their weights, cut ones their slices.

    Args:
        model: the whole, with values for this rank's layers only.
        file: a `.keras` or `.weights.h5` file of the uncut model.
        is_here: whether the layer at a path is on this rank.
        options: as for `Model.load_weights`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is of another model.
    """
    if not is_cut(model):
        saving.read_weights(model, file, _skipped(model, is_here), **options)
        return
    with without_values() as scope:  # which holds what is read
        twin = uncut_clone(model)
        saving.read_weights(twin, file, _skipped(twin, is_here), **options)
    for own, whole in zip(model.weights, twin.weights, strict=True):
        value, mark = scope.get_current_value(whole), mark_of(own)
        if value is not None:
            own.assign(value if mark is None else mark[0].of(value))
    here = [call.operation for call in calls_of(model).calls if is_here(call.path)]
    derive_anew(one for one in here if isinstance(one, keras.layers.Layer))


def read_optimizer(model: keras.Model, file: str, optimizer: keras.optimizers.Optimizer) -> str | None:
    """Gives a stage's optimizer its part of the state in a file.

    Args:
        model: the whole, with or without values.
        file: as in `read_weights`.
        optimizer: the stage's, built.

    Returns:
        What is wrong with the file, None if it fits. `optimizer` is unchanged then.
    """
    if is_composed(optimizer):
        return f"{_RULE} Received: filepath={file!r} for a MultiOptimizer, whose state is not saved."
    trained = model.trainable_variables
    count, wanted = numbers_in_file(optimizer, positions_of(optimizer, model), trained)
    with saving.optimizer_in(file) as store:
        found = len(store.keys())
        if found != count:
            return f"{_RULE} Received: filepath={file!r} with {found} optimizer variables for {count}."
        for number, variable, weight in wanted:
            value, mark = store[str(number)], mark_of(weight)
            if mark is not None and variable.shape == weight.shape:
                variable.assign(mark[0].of(value))
            else:
                variable.assign(value[()])
    return None


def _skipped(model, is_here) -> list:
    return [call.operation for call in calls_of(model).calls if not is_here(call.path)]
