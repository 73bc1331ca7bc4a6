"""Which variables: patterns on their paths, or a predicate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import tensorflow as tf

from hvdext.keras_tools.numbering import renumbered
from hvdext.keras_tools.slice_marks import mark_of

Select = str | Sequence[str] | Callable[[object], bool] | None


def path_of(variable) -> str:
    """A Keras variable's path (`dense/kernel`), or a TensorFlow variable's name; a tensor has none."""
    if isinstance(variable, tf.Tensor):
        return "(tensor)"
    return getattr(variable, "path", None) or variable.name


def identity_of(variable) -> int:
    """The same number for a Keras variable and the TensorFlow variable it holds: either may be handed in."""
    return id(variable.value if hasattr(variable, "path") else variable)


def described(variables: Sequence) -> list[str]:
    """The variables' paths, numbered from 0, with shapes and dtypes, for a comparison of the ranks."""
    paths = renumbered([path_of(variable) for variable in variables])
    return [f"{path} {content_of(variable)}" for path, variable in zip(paths, variables, strict=True)]


def content_of(variable) -> str:
    """A variable's shape and dtype, and which slice it holds: ranks with different ones must not mix them."""
    marked = mark_of(variable)
    shape = tf.TensorShape(variable.shape)
    kind = f"{tuple(shape) if shape.rank is not None else shape} {tf.as_dtype(variable.dtype).name}"
    return kind if marked is None else f"{kind}, {marked[0]}"


def selected(variables: Sequence, select: Select, argument: str = "select") -> list[bool]:
    """Says of each of `variables` whether it is selected.

    Args:
        variables: Keras or TensorFlow variables.
        select: None for all; a shell-style pattern or a list of them, matched against the whole path
            (`"*/kernel"`; a variable is selected if any pattern matches); or a function that takes a
            variable and returns a bool.
        argument: the caller's name for `select`, for the message.

    Raises:
        ValueError: if a pattern, or the function, selects nothing.
    """
    if select is None:
        return [True] * len(variables)
    paths = [path_of(variable) for variable in variables]
    if callable(select):
        chosen = [bool(select(variable)) for variable in variables]
        _require_any(chosen, argument, getattr(select, "__name__", select), paths)
        return chosen
    chosen = [False] * len(variables)
    for pattern in [select] if isinstance(select, str) else select:
        matches = [fnmatchcase(path, pattern) for path in paths]
        _require_any(matches, argument, pattern, paths)
        chosen = [a or b for a, b in zip(chosen, matches, strict=True)]
    return chosen


def check_select(select: Select, argument: str = "select") -> None:
    """Refuses what can never be a selection, before there are variables to try it on.

    Raises:
        TypeError: if `select` is neither None, a pattern, patterns nor a function.
        ValueError: if it is an empty list of patterns.
    """
    if select is None or isinstance(select, str) or callable(select):
        return
    if isinstance(select, (list, tuple)) and all(isinstance(item, str) for item in select):
        if select:
            return
        raise ValueError(f"`{argument}` must hold at least one pattern. Received: {select!r}.")
    raise TypeError(
        f"`{argument}` must be a pattern, a list of patterns or a function of a variable. "
        f"Received: {argument}={select!r}."
    )


def _require_any(matches: list[bool], argument: str, received: object, paths: list[str]) -> None:
    if not any(matches):
        raise ValueError(
            f"`{argument}` must match at least one trainable variable. "
            f"Received: {received!r}, which matches none of {paths}."
        )
