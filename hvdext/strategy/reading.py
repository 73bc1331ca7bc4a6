"""What a strategy file may name, and how each value in it is read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from hvdext.comm.process_sets import ProcessSet
from hvdext.config.call import Call, RankLists, Target
from hvdext.config.position import Position, shown
from hvdext.config.reading import Reader, listed
from hvdext.sync import presets
from hvdext.sync.parameter_sync import ParameterSync
from hvdext.sync.rule import Corrected, Mean, Outer, Pull
from hvdext.sync.what import All, Matching, Rotating, What
from hvdext.sync.when import Adaptive, Always, AtEnd, Every, EveryEpoch, When
from hvdext.sync.whom import Everyone, Exponential, Group, Hierarchical, Pairs, Ring, Whom
from hvdext.sync.wire import Wire

# -- what there is to choose from -----------------------------------------------------------------------


def all_but(
    patterns: str | Sequence[str], trainable: bool = True, non_trainable: bool = True, slots: bool = False
) -> What:
    """`~hvd.sync.Matching(...)`; YAML has another meaning for the tilde."""
    return ~Matching(patterns, trainable=trainable, non_trainable=non_trainable, slots=slots)


def _answers(*functions: Callable) -> dict[str, Target]:
    """By their names in snake case: `EveryEpoch` is `every_epoch`."""
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", function.__name__).lower() for function in functions]
    return {name: Target(name, function) for name, function in zip(names, functions, strict=True)}


def _by_class(module, is_wanted) -> dict[str, Target]:
    found = {
        name: value for name, value in vars(module).items() if inspect.isclass(value) and is_wanted(value)
    }
    return {name: Target(name, value, tag="class") for name, value in found.items()}


def _is_optimizer(kind):
    # The wrappers of other optimizers have no learning rate.
    base = keras.optimizers.Optimizer
    return (
        issubclass(kind, base) and kind is not base and "learning_rate" in inspect.signature(kind).parameters
    )


def _is_schedule(kind):
    base = keras.optimizers.schedules.LearningRateSchedule
    return issubclass(kind, base) and kind is not base


WHAT = _answers(All, Matching, Rotating, all_but)
WHEN = _answers(Every, EveryEpoch, AtEnd, Always, Adaptive)
WHOM = _answers(Everyone, Group, Pairs, Ring, Exponential, Hierarchical)
RULE = _answers(Mean, Pull, Outer, Corrected)
PRESETS = {
    function.__name__: Target(function.__name__, function, tag="preset")
    for function in (
        presets.LocalSGD,
        presets.PostLocalSGD,
        presets.PartialSync,
        presets.SMA,
        presets.EASGD,
        presets.DiLoCo,
        presets.StreamingDiLoCo,
        presets.AsyncGossip,
        presets.SlowMo,
    )
}
OPTIMIZERS = _by_class(keras.optimizers, _is_optimizer)
SCHEDULES = _by_class(keras.optimizers.schedules, _is_schedule)
FIVE_ANSWERS = Target("sync", ParameterSync)
READER = Reader(schedules=SCHEDULES)  # what it reads by kind stands at the end

# -- calls ------------------------------------------------------------------------------------------------


def read_sync(value: Any, position: Position) -> Call:
    """Reads one sync: a preset with its arguments, or the five answers.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str) or (isinstance(value, Mapping) and "preset" in value):
        return READER.tagged(PRESETS, "preset", value, position)
    if isinstance(value, Mapping) and "when" not in value:
        unknown = [key for key in value if key not in FIVE_ANSWERS.parameters]
        if not unknown:
            raise position.error(
                f"there must be a `preset`, or `when` to exchange. Received: {listed(value)}."
            )
    return READER.call(FIVE_ANSWERS, value, position, also=("preset",))


# -- values -----------------------------------------------------------------------------------------------


def _read_what(value, position):
    is_pattern = isinstance(value, str) and value not in WHAT and re.search(r"[*?\[/]", value)
    if is_pattern or isinstance(value, list):
        value = {"matching": value}
    return READER.choice(WHAT, value, position)


def _read_wire(value, position):
    if isinstance(value, Mapping):
        return READER.call(_WIRE, value, position)
    if not isinstance(value, str):
        raise position.error(
            f"`wire` must be a format such as int8, or its mapping. Received: {shown(value)}."
        )
    return value


def _read_process_set(value, position):
    lists = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for members in lists:
        try:
            ProcessSet(members)
        except ValueError as error:
            raise position.error(str(error).replace("ranks_or_comm", "process_set")) from None
    found = RankLists(tuple(tuple(members) for members in lists), position)
    members = [rank for ranks in lists for rank in ranks]
    if len(set(members)) != len(members):
        raise position.error(f"`process_set` must hold no rank in two of its sets. Received: {value}.")
    return found


_WIRE = Target("wire", Wire)
READER.by_kind |= {
    What: _read_what,
    When: lambda value, position: READER.choice(WHEN, value, position),
    Whom: lambda value, position: READER.choice(WHOM, value, position),
    Mean: lambda value, position: READER.choice(RULE, value, position),
    Wire: _read_wire,
    ProcessSet: _read_process_set,
    keras.optimizers.Optimizer: lambda value, position: READER.tagged(OPTIMIZERS, "class", value, position),
}
