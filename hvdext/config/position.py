"""Where in a file something stands, for messages: `strategy.yaml: sync.when.every.delay`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hvdext.common.checks import nearest


@dataclass(frozen=True)
class Position:
    """A key in a file.

    Attributes:
        source: the file, as the user named it.
        path: the keys from the top, "" for the file itself.
    """

    source: str
    path: str = ""

    def key(self, name: str) -> Position:
        """The position of key `name` in the mapping that stands here."""
        return Position(self.source, f"{self.path}.{name}" if self.path else name)

    def item(self, number: int) -> Position:
        """The position of an item, from 0, in the list that stands here."""
        return Position(self.source, f"{self.path}[{number}]")

    def error(self, message: str) -> ValueError:
        """A `ValueError` that says where."""
        return ValueError(f"{self}: {message}")

    def __str__(self) -> str:
        return f"{self.source}: {self.path}" if self.path else self.source


def shown(value: object) -> str:
    """`value` as the file's author knows it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def suggestion(received: object, choices: Iterable[str]) -> str:
    """A sentence that suggests one of `choices`, or lists them."""
    choices = list(choices)
    same = (choice for choice in choices if choice.lower() == str(received).lower())
    found = next(same, None) or nearest(received, choices)
    return f"There are: {', '.join(choices)}." if found is None else f"Did you mean `{found}`?"
