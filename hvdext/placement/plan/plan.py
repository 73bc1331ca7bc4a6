"""`Plan`: which layer goes where, printed, drawn, stored and compared with a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from hvdext.common.arguments import suggests_keywords
from hvdext.placement.plan.assignment import Assignment, some
from hvdext.placement.plan.drawing import draw
from hvdext.placement.plan.graph import Graph
from hvdext.placement.plan.plan_file import read, write
from hvdext.placement.plan.reading import read as read_model
from hvdext.placement.plan.table import as_text

if TYPE_CHECKING:
    import keras


@suggests_keywords
@dataclass(frozen=True)
class Plan(Assignment):
    """Which layer is where. Inputs of the model are at place 0.

    Attributes:
        graph: the model.
        stages: for each place the paths of its layers, in the order in which they are first called.
        balance: what the places were to get equal shares of.
        batch_size: samples whose activations count as memory.
        slots: optimizer variables per trained parameter that count as memory.
        crossing: what tensors between places weigh in the cost.

    Raises:
        ValueError: if a layer is missing, unknown or in two places, a place has none, or an input is not at
            place 0.
    """

    def table(self) -> str:
        """The plan as text: what each place carries, and what crosses."""
        return as_text(self)

    def draw(self, path: str | os.PathLike) -> None:
        """Draws the plan into the image file at `path`: who is where, how heavy, and what crosses.

        Raises:
            ImportError: if matplotlib is not installed (`pip install matplotlib`).
        """
        draw(self, path)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan to the YAML file at `path`; `Plan.load` gives the same plan.

        In the file each layer is one line: edit its `place` and load it again.
        """
        write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Plan:
        """Reads a plan from a YAML file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is no plan, or its layers are not placed as `Plan` demands.
        """
        assignment = read(path)
        return cls(**{field.name: getattr(assignment, field.name) for field in fields(assignment)})

    def check(self, model: keras.Model | Graph) -> None:
        """Makes sure that this is a plan for `model`: the same layers, by path, class and size.

        Raises:
            ValueError: if they differ; the message names those that do.
        """
        graph = model if isinstance(model, Graph) else read_model(model)
        ours, theirs = self.graph.by_path, graph.by_path
        missing = [path for path in theirs if path not in ours]
        unknown = [path for path in ours if path not in theirs]
        other = [p for p in ours if p in theirs and not _are_alike(ours[p], theirs[p])]
        if missing or unknown or other:
            parts = {
                "only in the model": missing,
                "only in the plan": unknown,
                "of another class or size": other,
            }
            listed = "; ".join(f"{what}: {some(paths)}" for what, paths in parts.items() if paths)
            raise ValueError(
                f"`plan` must be a plan for the model {graph.name!r}. Received: one for {self.model!r}; "
                f"{listed}. Keras numbers layers without a name through the whole process: name them, or "
                "call keras.utils.clear_session() before the model is built again."
            )

    def __str__(self) -> str:
        return self.table()


def _are_alike(a, b):
    return (a.kind, a.parameters, a.is_input) == (b.kind, b.parameters, b.is_input)
