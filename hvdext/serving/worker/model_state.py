"""What a model keeps from one batch to the next: the variables that computing may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hvdext.keras_tools.selection import path_of

_MOST_BYTES = 64 << 20  # larger variables are weights
_RANDOM = ("seed_generator_state", "StateVar", "StateVar:0")  # as Keras and TensorFlow call theirs


class ModelState:
    """The values of a model's variables that are no weights, as they are now.

    Args:
        variables: the model's, of Keras or TensorFlow, each with a value.
    """

    def __init__(self, variables: Iterable[Any]):
        self._values: list[tuple[Any, np.ndarray]] = []
        left = _MOST_BYTES
        for variable in variables:
            size = int(np.prod(variable.shape)) * 8
            if not variable.trainable and size <= left and "string" not in str(variable.dtype):
                self._values.append((variable, np.asarray(variable).copy()))
                left -= size

    def restore(self, only_random: bool = False) -> None:
        """Gives the variables these values again.

        Args:
            only_random: leave all but the states of random generators as they are.
        """
        for variable, value in self._values:
            if not only_random or path_of(variable).endswith(_RANDOM):
                variable.assign(value)

    def narrow(self) -> None:
        """Looks after those only that have other values now: computing has changed these, and no others."""
        self._values = [(one, value) for one, value in self._values if not _has(one, value)]

    def changed(self) -> list[str]:
        """Those that have other values now, without the states of random generators."""
        return [
            path_of(variable)
            for variable, value in self._values
            if not path_of(variable).endswith(_RANDOM) and not _has(variable, value)
        ]


def _has(variable: Any, value: np.ndarray) -> bool:
    return np.array_equal(np.asarray(variable), value, equal_nan=value.dtype.kind == "f")
