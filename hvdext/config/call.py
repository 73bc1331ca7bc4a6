"""One call that a file spells out: whose, and with which arguments."""

from __future__ import annotations

import enum
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvdext.comm.process_sets import ProcessSet
from hvdext.config.position import Position, shown

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Parameter:
    """One argument of a `Target`.

    Attributes:
        name: its name.
        kinds: the types that its annotation allows; of Keras' classes, which have none, the default's.
        is_required: whether it has no default.
        is_positional: whether the function takes any number of them (`*patterns`).
    """

    name: str
    kinds: tuple[Any, ...]
    is_required: bool
    is_positional: bool

    @property
    def fits_files(self) -> bool:
        """Whether a file can hold it at all: batches, data and functions it cannot."""
        return not all(kind is type(None) or _is_data(kind) for kind in self.kinds)

    def checked(self, value: Any, position: Position) -> Any:
        """A plain value of the right type; a whole number where only others fit becomes one.

        Raises:
            ValueError: if it is another.
        """
        kinds = [kind for kind in self.kinds if not _is_data(kind)]
        if all(kind in _WORDS for kind in kinds) and not self._fits(value):
            raise position.error(
                f"`{self.name}` must be {' or '.join(_WORDS[kind] for kind in kinds)}. "
                f"Received: {self.name}={shown(value)}, {_WORDS.get(type(value), 'a list or mapping')}."
            )
        # Keras computes a schedule's values in the type of its first number.
        is_whole = type(value) is int and not {int, type(None)} & set(kinds)
        return float(value) if is_whole and float in kinds else frozen(value)

    def _fits(self, value):
        kind = type(value)
        return kind in self.kinds or (kind is int and float in self.kinds)


@dataclass(frozen=True)
class Target:
    """A class or function that a file can ask for.

    Attributes:
        name: what the file calls it: "every", "StreamingDiLoCo", "gradients".
        function: what is called.
        tag: the key that its name stands under, beside the arguments ("preset", "class"); "": its name is
            itself a key, with the arguments under it.
        given: arguments that do not come from the file.
    """

    name: str
    function: Callable[..., Any]
    tag: str = ""
    given: tuple[str, ...] = ()

    @functools.cached_property
    def all_parameters(self) -> dict[str, Parameter]:
        """By name, `given` and those that are data among them."""
        function = self.function
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
        found = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                found[name] = Parameter(
                    name,
                    _kinds(hints[name]) if name in hints else _kinds_without_hint(parameter),
                    parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL,
                    parameter.kind is parameter.VAR_POSITIONAL,
                )
        return found

    @property
    def parameters(self) -> dict[str, Parameter]:
        """What a file can hold, by name."""
        return {
            name: parameter
            for name, parameter in self.all_parameters.items()
            if parameter.fits_files and name not in self.given
        }

    @property
    def data(self) -> list[str]:
        """The arguments that are data or functions, which a file cannot hold."""
        return [n for n in self.all_parameters if n not in self.parameters and n not in self.given]


@dataclass(frozen=True)
class Call:
    """A `Target` with its arguments.

    Attributes:
        target: what is called.
        arguments: by name; plain values, members of enumerations, and objects with a `make` of their own.
        position: where it stands.
    """

    target: Target
    arguments: Mapping[str, Any]
    position: Position = field(compare=False, repr=False)

    def make(self, rank: int | None = None, **more: Any) -> Any:
        """Makes the object, a fresh one each time.

        Args:
            rank: whose; None: any rank's, to look whether it can be made.
            **more: arguments that do not come from the file.

        Raises:
            TypeError, ValueError: as the Python way, with the position in front.
        """
        arguments = {name: _made(value, rank) for name, value in self.arguments.items()}
        positional = [
            arguments.pop(name)
            for name, parameter in self.target.parameters.items()
            if parameter.is_positional and name in arguments
        ]
        try:
            return self.target.function(*positional, **arguments, **more)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self._place_of(error)}: {error}") from error

    def plain(self) -> Any:
        """As a file writes it, spelled out."""
        arguments = {name: plain(value) for name, value in self.arguments.items()}
        return {self.target.tag: self.target.name} | arguments if self.target.tag else arguments

    def _place_of(self, error):
        """The key that `error` begins with, as messages of the Python way do, or the whole call."""
        named = re.match(r"`(\w+)`", str(error))
        return self.position.key(named[1]) if named and named[1] in self.arguments else self.position


@dataclass(frozen=True)
class Answer:
    """One of several calls, by its name: `every: {steps: 32}`.

    Attributes:
        call: the one that the file names.
    """

    call: Call

    def make(self, rank: int | None = None) -> Any:
        """As in `Call`."""
        return self.call.make(rank)

    def plain(self) -> Any:
        """As in `Call`."""
        arguments = self.call.plain()
        return {self.call.target.name: arguments} if arguments else self.call.target.name


@dataclass(frozen=True)
class RankLists:
    """A process set: one for all ranks, or several of which each rank takes the one it is in.

    Attributes:
        sets: the members of each.
        position: where they stand.
    """

    sets: tuple[tuple[int, ...], ...]
    position: Position = field(compare=False, repr=False)

    def make(self, rank: int | None = None) -> ProcessSet:
        """The set of global rank `rank`; None: of any.

        Raises:
            ValueError: if there are several and it is in none.
        """
        if rank is None or len(self.sets) == 1:
            return ProcessSet(self.sets[0])
        for members in self.sets:
            if rank in members:
                return ProcessSet(members)
        raise self.position.error(
            f"`process_set` must hold every rank. Received: {plain(self.sets)} on rank {rank}."
        )

    def plain(self) -> Any:
        """As in `Call`."""
        return plain(self.sets[0] if len(self.sets) == 1 else self.sets)


def plain(value: Any) -> Any:
    """`value` as `yaml.safe_load` would give it."""
    if hasattr(value, "plain"):
        return value.plain()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def frozen(value: Any) -> Any:
    """`value` with what could be changed replaced by what cannot."""
    if isinstance(value, Mapping):
        return types.MappingProxyType({key: frozen(item) for key, item in value.items()})
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


def _made(value, rank):
    if hasattr(value, "make"):
        return value.make(rank)
    return value if isinstance(value, enum.Enum) else plain(value)


def _kinds(hint) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for member in typing.get_args(hint) for kind in _kinds(member))
    return (hint,)


def _kinds_without_hint(parameter) -> tuple[Any, ...]:
    """Of Keras' optimizers and schedules: numbers, unless the default says otherwise."""
    if parameter.name == "name":
        return (str, type(None))
    if parameter.default is parameter.empty:
        return (float, Sequence)
    return (float, type(None)) if parameter.default is None else (type(parameter.default),)


def _is_data(kind):
    # Lists of lists are lists of a model's variables.
    outside = kind is Any or (typing.get_origin(kind) or kind) in (tuple, Callable)
    return outside or typing.get_args(kind) == (Sequence,)
