"""What the ranks of a pipeline compare and build before the first batch that a compiled model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import keras
import numpy as np

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import alike
from hvdext.keras_tools.functional import outputs_like
from hvdext.keras_tools.optimizers import build, innermost
from hvdext.keras_tools.replacing import replace
from hvdext.keras_tools.training import (
    build_symbolically,
    compiled_loss,
    first_batch,
    number_of_batches,
    peeked,
)
from hvdext.placement.pipeline.data import digest
from hvdext.placement.pipeline.preflight import require_none, require_same_number_of_batches, settings_of


class FirstBatch:
    """Compares a pipeline's ranks before the first batch after `compile`; later ones as they come.

    It hangs on no method that Keras may or may not call: the model calls it where the user calls the model,
    and a step asks whether that has been done.

    Args:
        comm: the pipeline's ranks.
        subject: what they have, for messages.
        function: the whole model's graph.
        last: the rank of the last stage.
    """

    def __init__(self, comm: Communicator, subject: str, function: keras.Function, last: int):
        self._comm = comm
        self._subject = subject
        self._function = function
        self._last = last
        self._is_compared = False
        self._stand_in: keras.Variable | None = None

    def forget(self) -> None:
        """Compares anew: the model has been compiled."""
        self._is_compared = False

    def of_epoch(self, model: keras.Model, x: Any, y: Any, steps: int | None, **options: Any) -> Any:
        """Compares the number of batches and, once, the first batch. All ranks call it.

        Args:
            model: compiled.
            x: as for `fit`.
            y: as for `fit`.
            steps: per epoch, or None.
            **options: `batch_size`, `sample_weight` and `class_weight`, as for `fit`.

        Returns:
            `x`, with all its batches.

        Raises:
            ValueError: on every rank alike, if something differs.
        """

        def look():
            number = number_of_batches(x, options["batch_size"], steps)
            if self._is_compared:
                return number, None, x
            if isinstance(x, GeneratorType):
                return number, *peeked(x)
            return number, first_batch(model, x, y, steps_per_epoch=steps, **options), x

        what = f"The data of {self._subject} cannot be read"
        number, batch, x = alike(self._comm, look, what, "hvdext.placement.data")
        require_same_number_of_batches(self._comm, number)
        if not self._is_compared:
            self.compare(model, batch)
        return x

    def of_validation(self, data: Any, batch_size: int | None, options: Mapping[str, Any]) -> None:
        """Compares the number of batches that `fit` validates with. All ranks call it.

        Args:
            data: the validation data.
            batch_size: of `fit`.
            options: further arguments of `fit`, by name.

        Raises:
            ValueError: on every rank alike, if the numbers differ.
        """
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        rows = options.get("validation_batch_size") or batch_size
        require_same_number_of_batches(
            self._comm, number_of_batches(x, rows, options.get("validation_steps"))
        )

    def compare(self, model: keras.Model, batch: Any, problem: str | None = None) -> None:
        """Compares settings and a batch, once; builds metrics and optimizer. All ranks call it.

        Args:
            model: compiled.
            batch: as Keras has it: (x, y, sample_weight), or less.
            problem: what is wrong with it, on this rank.

        Raises:
            ValueError: on every rank alike, if something differs, or the last stage has no targets.
        """
        if self._is_compared:
            if problem is not None:
                raise ValueError(problem)
            return
        require_none(self._comm, problem)
        y, sample_weight = _targets_alike(self._comm, self._subject, settings_of(model), batch, self._last)
        _build_metrics(model, self._function, y, sample_weight)
        self.build_optimizer(model)
        self._is_compared = True

    def require_compared(self) -> None:
        """Called by a step.

        Raises:
            RuntimeError: if the ranks have not been compared.
        """
        if not self._is_compared:
            raise RuntimeError(
                "The ranks of a pipeline must be compared before their first batch: call fit, evaluate, "
                "train_on_batch or test_on_batch on all of them. "
                f"Received: a batch for {self._subject}, whose ranks have not been."
            )

    def build_optimizer(self, model: keras.Model) -> None:
        """Gives a stage's optimizer its variables.

        Args:
            model: the stage's, compiled.
        """
        if not model.trainable_variables:  # of which Keras takes as many averages as the optimizer keeps
            replace(innermost(model.optimizer), finalize_variable_values=lambda trained: None)
        build(model.optimizer, model.trainable_variables or [self.stand_in])

    @property
    def stand_in(self) -> keras.Variable:
        """Trained by a stage without trained weights, whose optimizer counts along; no weight of the model.

        It stands here, where Keras does not look for weights.
        """
        if self._stand_in is None:
            self._stand_in = keras.Variable(np.zeros((), "float32"), name="nothing_to_train")
        return self._stand_in


def _targets_alike(
    comm: Communicator, subject: str, facts: Mapping[str, Any], batch: Any, last: int
) -> tuple[Any, Any]:
    """Returns y and sample_weight of the last stage, symbolic, after comparing settings and batches."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    agreement.check(comm, subject, {**facts, "rows of the first batch": keras.tree.flatten(x)[0].shape[0]})
    seen = {"x": digest(x), "y": digest(y)}
    structure = keras.tree.map_structure(
        lambda t: None if t is None else _Leaf(tuple(t.shape[1:]), t.dtype.name), (y, sample_weight)
    )
    everyone = comm.allgather_object((seen, structure), "hvdext.placement.batch")
    for what in seen:
        differ = {s[what] for s, _ in everyone if s[what] is not None}
        if len(differ) > 1:
            raise ValueError(
                f"`{what}` must have the same batches in the same order on all ranks of a pipeline that "
                "are given one: shuffle with the same seed on all. "
                f"Received: first batches that differ, by rank: {[s[what] for s, _ in everyone]}."
            )
    y, sample_weight = everyone[last][1]
    if y is None:
        raise ValueError("`y` must be given on the rank of the last stage. Received: y=None.")
    return keras.tree.map_structure(_symbolic, y), keras.tree.map_structure(_symbolic, sample_weight)


def _build_metrics(model: keras.Model, function: keras.Function, y: Any, sample_weight: Any) -> None:
    """Builds losses and metrics, also where they are idle: every rank keeps the same."""
    outputs = [keras.KerasTensor((None, *t.shape[1:]), t.dtype) for t in function.outputs]
    y_pred = outputs_like(function, outputs)
    build_symbolically(model.compute_metrics, None, y, y_pred, sample_weight=sample_weight)
    build_symbolically(compiled_loss(model), y, y_pred, sample_weight)


@dataclass(frozen=True)
class _Leaf:
    """A tensor of a batch but for its rows."""

    shape: tuple
    dtype: str


def _symbolic(leaf):
    return None if leaf is None else keras.KerasTensor((None, *leaf.shape), leaf.dtype)
