"""Reading and writing YAML: plain values only, and nothing passed over in silence."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hvdext.config.position import Position

# YAML 1.1 takes 1e-3 for text, since it has no dot; everybody means the number.
_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load`, but of two equal keys in one mapping the last does not win quietly."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"keys must be text. Received: {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key!r} must not stand twice in one mapping; it stands in line "
                    f"{seen[key].line + 1} already",
                    key_node.start_mark,
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)


class Line(dict):
    """A mapping that `write` puts into one line, with all that is in it."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads as the same."""

    def represent_line(self, data: Line) -> yaml.Node:
        """As any mapping, in one line."""
        return self.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)


_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)
_Dumper.add_representer(Line, _Dumper.represent_line)


def read(path: str | os.PathLike) -> Any:
    """What the file at `path` holds: mappings, lists, text, numbers, booleans and None.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is empty, no YAML, repeats a key or holds other values.
    """
    position = Position(os.fspath(path))
    try:
        data = yaml.load(Path(path).read_bytes(), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise position.error(f"{where}{error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError) as error:  # bytes that are no text; impossible dates and numbers
        raise position.error(str(error)) from None
    if data is None:
        raise position.error("the file must hold at least one section. Received: an empty file.")
    return plain_copy(data, position)


def write(data: Any, path: str | os.PathLike) -> None:
    """Writes `data`, in its own order, to the file at `path`."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    Path(path).write_text(text, encoding="utf-8")


def plain_copy(data: Any, position: Position) -> Any:
    """`data` in mappings and lists of its own.

    Raises:
        ValueError: if there are dates, sets or other objects in it, or it contains itself.
    """
    try:
        return json.loads(json.dumps(data))
    except (TypeError, ValueError) as error:
        raise position.error(
            f"values must be mappings, lists, text, numbers or true and false. Received: {error}."
        ) from None
