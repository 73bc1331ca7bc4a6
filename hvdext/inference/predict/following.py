"""State that goes on from batch to batch: each rank takes it to where one process would have it.

The noise of a random layer is a function of its generator's state, and each batch moves that by the same
number of draws. So a rank that begins at batch b begins with the state after b batches. What else a batch
changes (the states of a recurrent layer) can only be known by running all batches before it, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import on_all
from hvdext.common.wording import describe
from hvdext.inference.predict.values import of_tensor
from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.moving import Generator, Moving, moving


class Following:
    """The generators that a function draws from, at any batch.

    Args:
        generators: of this rank.
        begin: their states before batch 0, on rank 0: those of one process.
        keeps: whether they are left as one process leaves them; elsewhere they stay this rank's own.
    """

    def __init__(self, generators: list[Generator], begin: list[np.ndarray], *, keeps: bool):
        self._generators = generators
        self._begin = begin
        self._own = begin if keeps else [one.variable.numpy() for one in generators]

    def go_to(self, batch: int) -> None:
        """Called before a batch that does not follow the last one, at the least."""
        self._assign(self._begin, batch)

    def check(self, batch: int) -> None:
        """Called when the next batch would be `batch`.

        Raises:
            RuntimeError: if the batches have drawn otherwise than each other.
        """
        for generator, begin in zip(self._generators, self._begin, strict=True):
            if not np.array_equal(generator.variable.numpy(), generator.after(begin, batch)):
                raise RuntimeError(
                    "The batches must draw equally many random numbers each, for a rank to know where to "
                    f"begin. Received: another number from {generator.variable.name!r} before batch {batch}."
                )

    def finish(self, batches: int) -> None:
        """Called at the end, with how many batches there were in all."""
        self._assign(self._own, batches)

    def _assign(self, states, batch):
        for generator, state in zip(self._generators, states, strict=True):
            generator.variable.assign(generator.after(state, batch))


def follow(
    comm: Communicator,
    subject: str,
    model: keras.Model,
    function: Callable[[Any], Any],
    example: Any,
    *,
    trace: Callable[[], Any],
    is_eager: bool,
    between: Callable[[], None] = lambda: None,
) -> Following:
    """Finds out what goes on from batch to batch; every rank must call it, before its first batch.

    Args:
        comm: all ranks.
        subject: the function of hvdext, for the message.
        model: the user's.
        function: what a batch is handed to.
        example: a batch; None: there is none.
        trace: gives the concrete function that `function` runs, or would.
        is_eager: whether it would only.
        between: puts back what `function` may change.

    Raises:
        ValueError: on every rank alike, if something does that ranks cannot follow.
    """
    found = Moving()

    def look():
        nonlocal found
        if example is None:
            return []
        try:
            concrete = trace()
        except Exception as error:  # of the model, which may run eagerly all the same, or fails again
            if is_eager:
                _require_the_same_twice(function, example, between, error)
            return []
        found = moving(concrete, [v for metric in model.metrics for v in metric.variables])
        problem = _problem(model, found)
        if problem is not None:
            raise ValueError(problem)
        return [generator.variable.numpy() for generator in found.generators]

    states = on_all(
        comm, look, f"{subject} cannot compute the batches on different ranks", "hvdext.predict.moving"
    )
    return Following(found.generators, states[0], keeps=comm.rank == 0)


def _problem(model: keras.Model, found: Moving) -> str | None:
    rule = "`model` must not carry from batch to batch what ranks cannot know without the batches before. "
    if found.others:
        names = [layer.name for layer in flat_layers(model) if getattr(layer, "stateful", False)]
        layers = f" (the layers {names} are stateful)" if names else ""
        return (
            f"{rule}Received: one that changes {_listed(found.others)} in each batch{layers}. "
            "Call the model's own method in one process instead."
        )
    if found.operations:
        return (
            f"{rule}Received: one that draws random numbers by {_listed(found.operations)}, whose state no "
            "variable holds. Draw them by keras.random, with a keras.random.SeedGenerator, not by tf.random."
        )
    if found.uncountable:
        return (
            f"{rule}Received: one that draws from {_listed(found.uncountable)} within a loop or a condition, "
            "as often as the batch decides."
        )
    return None


def _require_the_same_twice(function, example, between, error):
    """What cannot be traced must give the same for the same batch."""
    try:
        first = _flat(function(example))
        between()
        second = _flat(function(example))
        between()
    except Exception:  # comes again with the first batch, and is told with its number
        return
    same = len(first) == len(second) and all(
        a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
        for a, b in zip(first, second, strict=True)
    )
    if not same:
        raise ValueError(
            "`model` must give the same for the same batch where its code cannot be traced, so that ranks "
            "need not know the batches before. Received: one that gives something else the second time, and "
            f"cannot be traced: {describe(error)}"
        ) from error


def _flat(outputs):
    values = [
        of_tensor(tf.convert_to_tensor(t) if np.isscalar(t) else t) for t in keras.tree.flatten(outputs)
    ]
    return [array for value in values for array in value.arrays]


def _listed(names):
    names = list(dict.fromkeys(names))
    shown = [repr(name) for name in names[:4]]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
