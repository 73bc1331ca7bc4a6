"""From what YAML gives to calls: each key looked up in a signature, each value read as its type says."""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import unknown_keyword
from hvdext.strategy.call import Answer, Call, Parameter, RankLists, Target, frozen
from hvdext.strategy.place import Place, nearest, shown
from hvdext.sync import presets
from hvdext.sync.parameter_sync import ParameterSync
from hvdext.sync.rule import Mean, Outer, Pull
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
RULE = _answers(Mean, Pull, Outer)
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

# -- calls ------------------------------------------------------------------------------------------------


def read_call(target: Target, value: Any, place: Place, also: Sequence[str] = ()) -> Call:
    """Reads a mapping of `target`'s arguments.

    Args:
        target: what is called.
        value: a mapping.
        place: where it stands.
        also: keys that are no arguments, and read elsewhere.

    Raises:
        ValueError: if a key is unknown or missing, or a value is of another type.
    """
    if not isinstance(value, Mapping):
        raise place.error(
            f"`{target.name}` must be a mapping of {_listed([*also, *target.parameters])}. "
            f"Received: {shown(value)}."
        )
    arguments = {}
    for name, item in value.items():
        if name in also:
            continue
        if name in target.data:
            raise place.key(name).error(
                f"`{name}` is data or a function, which a file cannot hold: "
                f"strategy.callbacks({target.name}={{{name!r}: ...}})."
            )
        if name not in target.parameters:
            raise place.key(str(name)).error(
                unknown_keyword(target.name, str(name), [*also, *target.parameters])
            )
        arguments[name] = read_argument(target.parameters[name], item, place.key(name))
    for name, parameter in target.parameters.items():
        if parameter.is_required and name not in arguments:
            raise place.error(f"`{name}` must be given. Received: {_listed(value) or 'nothing'}.")
    return Call(target, frozen(arguments), place)


def read_choice(choices: Mapping[str, Target], value: Any, place: Place) -> Answer:
    """Reads the name of one of `choices`, alone or with its arguments: `ring`, `every: {steps: 8}`.

    A value that is no mapping is the first argument: `every: 8`.

    Raises:
        ValueError: as `read_call`, or if there is no such name.
    """
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise place.error(
            f"there must be one of {_listed(choices)}, with its arguments one level below it. "
            f"Received: {shown(value)}."
        )
    ((name, arguments),) = value.items()
    if name not in choices:
        raise place.error(f"there is no {shown(name)}. {nearest(name, choices)}")
    target = choices[name]
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        if not target.parameters:
            raise place.key(name).error(f"`{name}` takes no arguments. Received: {shown(arguments)}.")
        arguments = {next(iter(target.parameters)): arguments}
    return Answer(read_call(target, arguments, place.key(name)))


def read_tagged(targets: Mapping[str, Target], tag: str, value: Any, place: Place) -> Call:
    """Reads `{class: SGD, learning_rate: 0.7}`, or the name alone.

    Raises:
        ValueError: as `read_call`, or if there is no such name.
    """
    if isinstance(value, str):
        value = {tag: value}
    if not isinstance(value, Mapping) or tag not in value:
        raise place.error(f"there must be a mapping with the key `{tag}`. Received: {shown(value)}.")
    name = value[tag]
    if name not in targets:
        raise place.key(tag).error(f"there is no {shown(name)}. {nearest(name, targets)}")
    return read_call(targets[name], value, place, also=(tag,))


def read_sync(value: Any, place: Place) -> Call:
    """Reads one sync: a preset with its arguments, or the five answers.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str) or (isinstance(value, Mapping) and "preset" in value):
        return read_tagged(PRESETS, "preset", value, place)
    if isinstance(value, Mapping) and "when" not in value:
        unknown = [key for key in value if key not in FIVE_ANSWERS.parameters]
        if not unknown:
            raise place.error(f"there must be a `preset`, or `when` to exchange. Received: {_listed(value)}.")
    return read_call(FIVE_ANSWERS, value, place, also=("preset",))


# -- values -----------------------------------------------------------------------------------------------


def read_argument(parameter: Parameter, value: Any, place: Place) -> Any:
    """Reads the value of one argument as the types that it may have say.

    Raises:
        ValueError: if it is of none of them.
    """
    if value is None and type(None) in parameter.kinds:
        return None
    if parameter.name == "learning_rate" and isinstance(value, Mapping):
        return read_tagged(SCHEDULES, "class", value, place)
    for kind in parameter.kinds:
        if kind in _READERS:
            return _READERS[kind](value, place)
        if inspect.isclass(kind) and issubclass(kind, enum.Enum):
            return _read_member(kind, value, place)
    return parameter.checked(value, place)


def _read_what(value, place):
    is_pattern = isinstance(value, str) and value not in WHAT and re.search(r"[*?\[/]", value)
    if is_pattern or isinstance(value, list):
        value = {"matching": value}
    return read_choice(WHAT, value, place)


def _read_wire(value, place):
    if isinstance(value, Mapping):
        return read_call(_WIRE, value, place)
    if not isinstance(value, str):
        raise place.error(f"`wire` must be a format such as int8, or its mapping. Received: {shown(value)}.")
    return value


def _read_process_set(value, place):
    lists = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    for members in lists:
        try:
            ProcessSet(members)
        except ValueError as error:
            raise place.error(str(error).replace("ranks_or_comm", "process_set")) from None
    found = RankLists(tuple(tuple(members) for members in lists), place)
    members = [rank for ranks in lists for rank in ranks]
    if len(set(members)) != len(members):
        raise place.error(f"`process_set` must hold no rank in two of its sets. Received: {value}.")
    return found


def _read_member(kind, value, place):
    names = [member.value for member in kind]
    if value not in names:
        name = place.path.rpartition(".")[2]
        raise place.error(
            f"`{name}` must be one of {_listed(names)}. Received: {shown(value)}. {nearest(value, names)}"
        )
    return kind(value)


def _listed(names) -> str:
    return ", ".join(map(str, names))


_WIRE = Target("wire", Wire)
_READERS: dict[Any, Callable[[Any, Place], Any]] = {
    What: _read_what,
    When: lambda value, place: read_choice(WHEN, value, place),
    Whom: lambda value, place: read_choice(WHOM, value, place),
    Mean: lambda value, place: read_choice(RULE, value, place),
    Wire: _read_wire,
    ProcessSet: _read_process_set,
    keras.optimizers.Optimizer: lambda value, place: read_tagged(OPTIMIZERS, "class", value, place),
}
