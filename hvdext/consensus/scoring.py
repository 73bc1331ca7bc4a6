"""How good is the model that each rank holds? One number per rank, known to all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import on_all

Score = Callable[[Any], float]


def loss_on(batch: tuple) -> Score:
    """A function of a compiled model: its loss on `batch`, as `model.evaluate` would say, without dropout.

    Args:
        batch: (inputs,), (inputs, targets) or (inputs, targets, sample weights).
    """
    inputs, targets, weights = keras.utils.unpack_x_y_sample_weight(batch)
    data = keras.utils.pack_x_y_sample_weight(inputs, targets, weights)

    def score(model) -> float:
        model.reset_metrics()  # the loss is a mean over all batches since then
        try:
            logs = model.test_step(data)
            if "loss" not in logs:
                raise ValueError(
                    "`score` must be given instead of `probe` for a model whose `test_step` returns no "
                    f"'loss'. Received: {sorted(logs)}."
                )
            return float(logs["loss"])
        finally:
            model.reset_metrics()

    return score


def gather(comm: Communicator, score: Callable[[], float], name: str) -> list[float]:
    """Calls `score()` on every rank and returns all ranks' scores, in rank order.

    Args:
        comm: whose ranks; each of them must call it.
        score: this rank's own; may fail, which is heard by all.
        name: the collective's name, the same on every rank.

    Raises:
        Exception: on every rank alike, as `comm.failures.on_all` does, if `score()` raises or returns no
            number on any.
    """
    return on_all(comm, lambda: float(score()), "The model could not be scored", name)
