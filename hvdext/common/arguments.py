"""A wrong keyword gets the nearest valid one: `hvd.DistributedOptimizer(..., backward_passes=2)`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvdext.common.checks import nearest

F = TypeVar("F", bound=Callable[..., Any])
_OTHERS = "_hvdext_other_names"


def suggests_keywords(function: F) -> F:
    """Makes `function` (or a class's `__init__`) answer an unknown keyword with the nearest valid one.

    The signature stays visible to `inspect.signature`. Of a class, such as a dataclass, it decorates the
    `__init__`.

    Raises:
        TypeError: from the decorated function, if it is called with a keyword that it does not have.
    """
    if inspect.isclass(function):
        function.__init__ = suggests_keywords(function.__init__)  # type: ignore[method-assign]
        return function
    parameters = inspect.signature(function).parameters
    keywords = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    keywords = [name for name in keywords if name != "self"]

    others = getattr(function, _OTHERS, {})

    @functools.wraps(function)
    def checked(*args, **kwargs):
        kwargs = {others.get(name, name): value for name, value in kwargs.items()}
        for name in kwargs:
            if name not in keywords:
                raise TypeError(unknown_keyword(_label(function), name, keywords))
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


def _label(function):
    return "hvd." + function.__qualname__.removesuffix(".__init__")
