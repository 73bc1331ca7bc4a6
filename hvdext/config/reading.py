"""From what YAML gives to calls: each key looked up in a signature, each value read as its type says."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hvdext.common.arguments import unknown_keyword
from hvdext.config.call import Answer, Call, Parameter, Target, frozen
from hvdext.config.position import Position, shown, suggestion


class Reader:
    """Reads calls from mappings.

    Args:
        by_kind: how a value is read that must become one of a kind: a function of the value and its position.
        schedules: learning rate schedules by name, which a `learning_rate` may be, with its arguments.
    """

    def __init__(
        self,
        by_kind: Mapping[Any, Callable[[Any, Position], Any]] | None = None,
        schedules: Mapping[str, Target] | None = None,
    ):
        self.by_kind = dict(by_kind or {})
        self.schedules = dict(schedules or {})

    def call(self, target: Target, value: Any, position: Position, also: Sequence[str] = ()) -> Call:
        """Reads a mapping of `target`'s arguments.

        Args:
            target: what is called.
            value: a mapping.
            position: where it stands.
            also: keys that are no arguments, and read elsewhere.

        Raises:
            ValueError: if a key is unknown or missing, or a value is of another type.
        """
        if not isinstance(value, Mapping):
            raise position.error(
                f"`{target.name}` must be a mapping of {listed([*also, *target.parameters])}. "
                f"Received: {shown(value)}."
            )
        arguments = {}
        for name, item in value.items():
            if name in also:
                continue
            if name in target.data:
                raise position.key(name).error(
                    f"`{name}` is data or a function, which a file cannot hold: "
                    f"strategy.callbacks({target.name}={{{name!r}: ...}})."
                )
            if name not in target.parameters:
                raise position.key(str(name)).error(
                    unknown_keyword(target.name, str(name), [*also, *target.parameters])
                )
            arguments[name] = self.argument(target.parameters[name], item, position.key(name))
        for name, parameter in target.parameters.items():
            if parameter.is_required and name not in arguments:
                raise position.error(f"`{name}` must be given. Received: {listed(value) or 'nothing'}.")
        return Call(target, frozen(arguments), position)

    def choice(self, choices: Mapping[str, Target], value: Any, position: Position) -> Answer:
        """Reads the name of one of `choices`, alone or with its arguments: `ring`, `every: {steps: 8}`.

        A value that is no mapping is the first argument: `every: 8`.

        Raises:
            ValueError: as `call`, or if there is no such name.
        """
        if isinstance(value, str):
            value = {value: None}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise position.error(
                f"there must be one of {listed(choices)}, with its arguments one level below it. "
                f"Received: {shown(value)}."
            )
        ((name, arguments),) = value.items()
        if name not in choices:
            raise position.error(f"there is no {shown(name)}. {suggestion(name, choices)}")
        target = choices[name]
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, Mapping):
            if not target.parameters:
                raise position.key(name).error(f"`{name}` takes no arguments. Received: {shown(arguments)}.")
            arguments = {next(iter(target.parameters)): arguments}
        return Answer(self.call(target, arguments, position.key(name)))

    def tagged(self, targets: Mapping[str, Target], tag: str, value: Any, position: Position) -> Call:
        """Reads `{class: SGD, learning_rate: 0.7}`, or the name alone.

        Raises:
            ValueError: as `call`, or if there is no such name.
        """
        if isinstance(value, str):
            value = {tag: value}
        if not isinstance(value, Mapping) or tag not in value:
            raise position.error(f"there must be a mapping with the key `{tag}`. Received: {shown(value)}.")
        name = value[tag]
        if name not in targets:
            raise position.key(tag).error(f"there is no {shown(name)}. {suggestion(name, targets)}")
        return self.call(targets[name], value, position, also=(tag,))

    def argument(self, parameter: Parameter, value: Any, position: Position) -> Any:
        """Reads the value of one argument as the types that it may have say.

        Raises:
            ValueError: if it is of none of them.
        """
        if value is None and type(None) in parameter.kinds:
            return None
        if self.schedules and parameter.name == "learning_rate" and isinstance(value, Mapping):
            return self.tagged(self.schedules, "class", value, position)
        for kind in parameter.kinds:
            if kind in self.by_kind:
                return self.by_kind[kind](value, position)
            if inspect.isclass(kind) and issubclass(kind, enum.Enum):
                return _read_member(kind, value, position)
        return parameter.checked(value, position)


def _read_member(kind, value, position):
    names = [member.value for member in kind]
    if value not in names:
        name = position.path.rpartition(".")[2]
        raise position.error(
            f"`{name}` must be one of {listed(names)}. Received: {shown(value)}. {suggestion(value, names)}"
        )
    return kind(value)


def listed(names) -> str:
    """`names`, for a message."""
    return ", ".join(map(str, names))
