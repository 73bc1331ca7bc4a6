"""Models with a `predict` or `evaluate` of their own, as tasks have that bring their preprocessing along.

Entering Keras below such a method would skip what it does. So each rank calls it, with its own rows, and a
few batches show beforehand whether a row's answer depends on the rows that come along with it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import on_all
from hvdext.inference.predict.sources.raw import Given, RawDataset, RawRows
from hvdext.inference.predict.sources.rows import row_count
from hvdext.inference.predict.values import of_tensor

_OURS = ("keras", "hvdext")  # packages whose methods do what `hvd.predict` and `hvd.evaluate` do
_calling: ContextVar[str | None] = ContextVar("hvdext_own_method", default=None)


def own_method(model: Any, *names: str) -> str | None:
    """The first method of `names` that is neither Keras' nor hvdext's, as "Class.method"; None if all are."""
    for name in names:
        if name in vars(model):
            return f"{type(model).__name__}.{name}"
        owner = next(cls for cls in type(model).__mro__ if name in vars(cls))
        if owner.__module__.partition(".")[0] not in _OURS:
            return f"{owner.__name__}.{name}"
    return None


def require_outside(subject: str) -> None:
    """Raises within a method that is called for this function, and would call it again."""
    caller = _calling.get()
    if caller is not None:
        raise RuntimeError(
            f"{subject} must not be called by {caller}, which it calls on every rank for its share. "
            "Call super() there."
        )


class OwnMethod:
    """A model's own `predict` or `evaluate`, called with some of the rows.

    Args:
        model: the user's.
        method: "predict" or "evaluate".
        label: "Class.method", for messages.
        names: of the data besides `x`.
        options: what it must take besides the data.
        wishes: what it is given if it takes it.

    Raises:
        ValueError: if its signature does not allow it.
    """

    def __init__(
        self,
        model,
        method: str,
        label: str,
        names: list[str],
        options: dict[str, Any],
        wishes: dict[str, Any],
    ):
        self.label = label
        self._method = getattr(model, method)
        signature = inspect.signature(self._method)
        parameters = signature.parameters
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
        self._options = options | {n: v for n, v in wishes.items() if takes_any or n in parameters}
        try:
            signature.bind(None, **dict.fromkeys(names), **self._options)
        except TypeError as error:
            raise ValueError(
                f"`model` must take {['x', *names, *self._options]} in {label}, which each rank calls with "
                f"its rows. Received: a method with the signature {signature}: {error}."
            ) from error

    def __call__(self, given: Given) -> Any:
        """What the method returns."""
        token = _calling.set(self.label)
        try:
            rest = {name: part for name, part in given.data.items() if name != "x"}
            return self._method(given.data["x"], **rest, **self._options)
        finally:
            _calling.reset(token)


def rows_alone(outputs: Any, rows: int, label: str) -> Any:
    """`outputs`, if they have one row for each row of the input.

    Raises:
        ValueError: if they have not.
    """
    leaves = keras.tree.flatten(outputs)
    lengths = [_length(leaf) for leaf in leaves]
    if not leaves or set(lengths) != {rows}:
        raise ValueError(
            f"`model` must return arrays with one row for each row of `x` from {label}, for them to be put "
            f"together. Received: a {type(outputs).__name__} with {lengths[:4]} rows, for {rows}."
        )
    return outputs


def require_independent_rows(
    comm: Communicator,
    subject: str,
    own: OwnMethod,
    source: RawRows | RawDataset,
    look: Callable[[Given], list],
) -> None:
    """Raises unless a batch's answer is the same each time, and alone as with another; every rank calls it.

    Args:
        comm: all ranks.
        subject: the function of hvdext, for the message.
        own: the method.
        source: of which nothing has been read.
        look: what to compare of a call with some data, as a list of arrays: predictions, which must be equal
            row by row, or sums, which must add up.

    Raises:
        ValueError: on every rank alike.
    """
    is_sum = subject == "hvd.evaluate"

    def check():
        example = source.example()
        if example is None:
            return
        one, again = look(example), look(example)
        if not _close(one, again):
            raise ValueError(
                f"`model` must answer a batch alike each time it is called, for ranks to share the batches. "
                f"Received: one whose {own.label} answers otherwise the second time (random layers, states)."
            )
        if isinstance(source, RawRows) and (source.batches or 0) > 1:
            first, second = look(source.cut(0, 2)), look(source.cut(1, 2))
            alone = [a + b if is_sum else np.concatenate([a, b]) for a, b in zip(one, second, strict=True)]
            if not _close(alone, first):
                raise ValueError(
                    f"`model` must answer each row by itself, for ranks to share the rows. Received: one "
                    f"whose {own.label} answers two batches together otherwise than each alone. "
                    "Do before what looks at all rows."
                )

    on_all(comm, check, f"{subject} cannot share the rows", "hvdext.predict.own")


def arrays_of(outputs: Any) -> list[np.ndarray]:
    """The numbers and texts in predictions, in the order of their rows."""
    values = [of_tensor(leaf) for leaf in keras.tree.flatten(outputs)]
    return [value.arrays[1] if value.kind == "sparse" else value.arrays[0] for value in values]


def _close(some, others):
    with contextlib.suppress(ValueError, TypeError):
        return len(some) == len(others) and all(
            _equal(np.asarray(a), np.asarray(b)) for a, b in zip(some, others, strict=True)
        )
    return False


def _equal(one, other):
    if one.shape != other.shape:
        return False
    if one.dtype.kind not in "biufc":
        return bool(np.all(one == other))
    scale = float(np.max(np.abs(one), initial=0.0, where=np.isfinite(one)))
    return np.allclose(one, other, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)


def _length(leaf):
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        return row_count(leaf)
    return len(leaf) if np.ndim(leaf) else None
