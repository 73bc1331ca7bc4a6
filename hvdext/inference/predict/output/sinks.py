"""What becomes of predictions: arrays in memory, files, or nothing on a rank that does not get them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from hvdext.inference.predict.output.output_folder import OutputFolder
from hvdext.inference.predict.parts import Part
from hvdext.inference.predict.values import Value, joined, nothing_like, skeleton


class Nowhere:
    """A rank that gets no predictions."""

    rows_kept = 0

    def take(self, parts: Sequence[Part]) -> None:
        """As in `Sink`."""

    def result(self, trace: Any) -> None:
        """None."""


class InMemory:
    """Predictions as `model.predict` returns them."""

    rows_kept = 0  # that a later run can go on from

    def __init__(self) -> None:
        self._structure: Any = None
        self._outputs: list[list[Value]] = []

    def take(self, parts: Sequence[Part]) -> None:
        """As in `Sink`."""
        for part in parts:
            if not part.report.batches:
                continue
            if not self._outputs:
                self._structure = part.report.structure
                self._outputs = [[] for _ in part.outputs]
            for output, values in zip(self._outputs, part.outputs, strict=True):
                output.extend(values)

    def result(self, trace: Any) -> Any:
        """The predictions.

        Args:
            trace: called without arguments if there has been no batch; gives symbolic outputs.
        """
        if self._structure is None:
            symbolic = trace()
            return keras.tree.map_structure(lambda output: joined([nothing_like(output)]), symbolic)
        found = []
        while self._outputs:  # one after the other, so that only one is in memory twice
            found.append(joined(self._outputs.pop(0)))
        return keras.tree.pack_sequence_as(self._structure, found)


class OnDisk:
    """Predictions in an `OutputFolder`."""

    def __init__(self, folder: OutputFolder):
        self._folder = folder
        self._structure: Any = None

    @property
    def rows_kept(self) -> int:
        """Rows that a later run need not compute."""
        return self._folder.done.rows

    def take(self, parts: Sequence[Part]) -> None:
        """As in `Sink`."""
        for part in parts:
            report = part.report
            if report.batches:
                self._structure = report.structure
                self._folder.append(report.structure, part.outputs, report.batches, report.rows)
        self._folder.flush()

    def result(self, trace: Any) -> Any:
        """The predictions, mapped into memory; `trace` as in `InMemory`."""
        if self._structure is not None:
            return self._folder.finish(self._structure, [])
        symbolic = trace()
        nothing = [nothing_like(output) for output in keras.tree.flatten(symbolic)]
        return self._folder.finish(skeleton(symbolic), nothing)
