"""Where the public names are, for the message about one that is not there: `hvd.DiLoCo`."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from hvdext.common.checks import nearest

MODULES = ("callbacks", "data", "elastic", "engine", "sync")  # below `hvd`


def unknown_name(module: str, received: str, known: Sequence[str]) -> AttributeError:
    """The error for a name that a public module does not have: it says where it is, or which one is near.

    Args:
        module: the module, such as "hvdext" or "hvdext.sync".
        received: the name.
        known: the names that the module has.
    """
    text = f"module {module!r} has no attribute {received!r}."
    if received.startswith("_"):  # such as those that `inspect` and `copy` look for
        return AttributeError(text)
    here = module.removeprefix("hvdext").removeprefix(".")
    homes = {name: home for home in (*MODULES, "") for name in _names(home)} | dict.fromkeys(known, here)
    near = received if received in homes else _nearest(received, known) or _nearest(received, homes)
    if near is not None:
        text += f" Did you mean `{'.'.join(filter(None, ['hvd', homes[near], near]))}`?"
    return AttributeError(text)


def home_of(name: str, module: str) -> str:
    """The public module below `hvd` in which users find a name; empty: `hvd` itself.

    Args:
        name: of a class or function.
        module: where its code is; decides where more than one has the name.
    """
    homes = [home for home in MODULES if name in _names(home)]
    own = module.split(".")[1:2]
    return own[0] if own and own[0] in homes else next(iter(homes), "")


def _nearest(word, known):
    """The nearest name, whatever its capital letters and underscores."""
    plain = {_plain(name): name for name in known}
    near = nearest(_plain(word), plain)
    return None if near is None else plain[near]


def _plain(name):
    return name.lower().replace("_", "")


@functools.cache
def _names(module):
    """What a public module exports, read without importing it and all that it needs."""
    if not module:
        return tuple(sys.modules["hvdext"].__all__)
    spec = importlib.util.find_spec(f"hvdext.{module}")
    assert spec is not None, module
    assert spec.origin is not None, module
    for statement in ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "__all__":
            return tuple(ast.literal_eval(statement.value))
    return ()
