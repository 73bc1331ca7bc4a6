"""A wrong keyword gets the nearest valid one: `hvd.DistributedOptimizer(..., backward_passes=2)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvdext.common.checks import nearest
from hvdext.common.public_names import home_of

F = TypeVar("F", bound=Callable[..., Any])
_OTHERS = "_hvdext_other_names"


def suggests_keywords(function: F) -> F:
    """Makes `function` (or a class's `__init__`) answer an unknown keyword with the nearest valid one.

    Too many arguments by position are answered with the names of those that are left. The signature stays
    visible to `inspect.signature`. Of a class, such as a dataclass, it decorates the `__init__`.

    Raises:
        TypeError: from the decorated function, if it is called with a keyword that it does not have, or with
            more arguments by position than it takes.
    """
    if inspect.isclass(function):
        function.__init__ = suggests_keywords(function.__init__)  # type: ignore[method-assign]
        return function
    parameters = inspect.signature(function).parameters
    keywords = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    keywords = [name for name in keywords if name != "self"]

    ordered = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    endless = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    others = getattr(function, _OTHERS, {})

    @functools.wraps(function)
    def checked(*args, **kwargs):
        kwargs = {others.get(name, name): value for name, value in kwargs.items()}
        for name in kwargs:
            if name not in keywords:
                raise TypeError(unknown_keyword(_label(function), name, keywords))
        if len(args) > len(ordered) and not endless:
            raise TypeError(_too_many(function, args, [n for n in ordered if n != "self"], keywords))
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def also_called(**others: str) -> Callable[[F], F]:
    """Lets `suggests_keywords` take an argument under another name as well: `also_called(tensor="value")`.

    For names that differ between Horovod's modules; the signature shows ours only.
    """

    def decorate(function: F) -> F:
        setattr(function, _OTHERS, others)
        return function

    return decorate


def unknown_keyword(function: str, received: str, keywords: Sequence[str]) -> str:
    """The message for a keyword that `function` does not have."""
    near = nearest(received, keywords)
    hint = f"It has: {', '.join(keywords)}." if near is None else f"Did you mean `{near}`?"
    return f"`{function}` has no argument `{received}`. {hint}"


def _too_many(function, args, ordered, keywords):
    by_name = [name for name in keywords if name not in ordered]
    rest = f" Pass the others by name: {', '.join(by_name)}." if by_name else ""
    return (
        f"`{_label(function)}` takes at most {len(ordered)} arguments by position "
        f"({', '.join(ordered)}). Received: {args[-1]!r} besides.{rest}"
    )


def _label(function):
    """What users call it: `hvd.sync.DiLoCo`."""
    name = function.__qualname__.removesuffix(".__init__")
    return ".".join(filter(None, ["hvd", home_of(name.partition(".")[0], function.__module__), name]))
