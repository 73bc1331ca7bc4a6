"""What an optimizer keeps: slots beside the variables that it trains, and what all stages have alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from hvdext.keras_tools.custom_objects import fresh_copy
from hvdext.keras_tools.deferred import rename
from hvdext.keras_tools.optimizers import innermost, members_of, trained_by


@dataclass(frozen=True)
class Slot:
    """A variable that an optimizer keeps beside a trained one.

    Attributes:
        kind: which of the optimizer's lists it is in, such as "_momentums".
        index: the trained variable's, in the optimizer's order.
        variable: the slot itself.
    """

    kind: str
    index: int
    variable: Any


def slots_of(optimizer: keras.optimizers.Optimizer) -> list[Slot]:
    """The variables of a built optimizer that belong to one trained variable each."""
    target = innermost(optimizer)
    count = len(trained_by(target))
    slots = []
    for kind, values in sorted(vars(target).items()):
        if kind in ("_variables", "_trainable_variables") or not isinstance(values, list):
            continue
        if len(values) == count and all(v is None or isinstance(v, keras.Variable) for v in values):
            slots += [Slot(kind, i, v) for i, v in enumerate(values) if v is not None]
    return slots


def common_variables(optimizer: keras.optimizers.Optimizer) -> list:
    """The variables of a built optimizer that all stages have alike: counters, learning rate, loss scale."""
    own = {id(slot.variable) for slot in slots_of(optimizer)}
    return [variable for variable in optimizer.variables if id(variable) not in own]


def is_composed(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether it is a `MultiOptimizer`, whose members keep slots for some variables each."""
    return bool(members_of(optimizer))


def positions_of(optimizer: keras.optimizers.Optimizer, whole: keras.Model) -> dict[int, int]:
    """For each variable that a stage's optimizer trains (by its index there) its index in the whole model."""
    places = {id(variable): i for i, variable in enumerate(whole.trainable_variables)}
    trained = trained_by(innermost(optimizer))
    return {i: places[id(variable)] for i, variable in enumerate(trained) if id(variable) in places}


def numbers_in_file(
    optimizer: keras.optimizers.Optimizer, positions: Mapping[int, int], whole: Sequence
) -> tuple[int, list[tuple[int, Any, Any]]]:
    """Where Keras keeps the state of a stage's optimizer among that of the whole model's.

    Args:
        optimizer: the stage's, built.
        positions: for each variable that it trains (by its index there) its index in `whole`.
        whole: the whole model's trained variables, with or without values.

    Returns:
        How many variables the whole optimizer has, and for each of this one's: the number of its counterpart,
        itself, and the trained variable that it belongs to, None for those that all stages have alike.
    """
    other = fresh_copy(optimizer)
    other.build([_tiny(variable) for variable in whole])
    numbers = {id(variable): i for i, variable in enumerate(other.variables)}
    theirs = {(slot.kind, slot.index): numbers[id(slot.variable)] for slot in slots_of(other)}
    found = [
        (theirs[slot.kind, positions[slot.index]], slot.variable, whole[positions[slot.index]])
        for slot in slots_of(optimizer)
        if slot.index in positions
    ]
    pairs = zip(common_variables(other), common_variables(optimizer), strict=True)
    found += [(numbers[id(their)], own, None) for their, own in pairs]
    return len(other.variables), found


def _tiny(variable) -> keras.Variable:
    """A variable for which an optimizer keeps the same slots as for `variable`, only smaller ones."""
    tiny = keras.Variable(np.zeros((1,) * len(variable.shape)), dtype=variable.dtype, name=variable.name)
    rename(tiny, variable.name, variable.path)
    tiny.overwrite_with_gradient = variable.overwrite_with_gradient
    return tiny
