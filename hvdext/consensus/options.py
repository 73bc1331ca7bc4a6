"""How the ranks agree on one set of weights: what `ConsensusAveraging` has been told, checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdext.common.checks import is_whole, require_choice
from hvdext.consensus.scoring import Score


@dataclass(frozen=True, kw_only=True)
class ConsensusOptions:
    """How to unify; `hvd.callbacks.ConsensusAveraging` says what each means.

    Raises:
        TypeError, ValueError: if one breaks its rule.
    """

    take: str = "mean"
    weight_by: str | None = "samples"
    probe: tuple | None = None
    score: Score | None = None
    reestimate_batch_norm: tuple[Iterable, int] | None = None
    evaluate: Any = None
    optimizer_state: bool = True
    on_nonfinite: str = "raise"

    def __post_init__(self) -> None:
        require_choice("take", self.take, ("mean", "best"))
        require_choice("weight_by", self.weight_by, (None, "samples"))
        require_choice("on_nonfinite", self.on_nonfinite, ("raise", "skip_rank"))
        _require_scoring(self.take, self.probe, self.score)
        if self.reestimate_batch_norm is not None:
            _require_batches(self.reestimate_batch_norm)
            # Python's own number: ranks compare it by how it prints.
            data, count = self.reestimate_batch_norm
            object.__setattr__(self, "reestimate_batch_norm", (data, int(count)))

    def facts(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        return {
            "take": self.take,
            "weight_by": self.weight_by,
            "probe is given": self.probe is not None,
            "score is given": self.score is not None,
            "batches for batch normalization": self.reestimate_batch_norm and self.reestimate_batch_norm[1],
            "evaluate is given": self.evaluate is not None,
            "optimizer_state": self.optimizer_state,
            "on_nonfinite": self.on_nonfinite,
        }


def _require_scoring(take, probe, score):
    given = [name for name, value in {"probe": probe, "score": score}.items() if value is not None]
    if len(given) != (take == "best"):
        raise ValueError(
            "`probe` or `score` must be given with take='best', one of them, and neither otherwise. "
            f"Received: take={take!r} with {' and '.join(given) or 'neither'}."
        )
    if score is not None and not callable(score):
        raise TypeError(f"`score` must be a function of a model. Received: score={score!r}.")
    if probe is not None and not (isinstance(probe, (tuple, list)) and 1 <= len(probe) <= 3):
        raise ValueError(
            "`probe` must be a batch: (inputs, targets) or (inputs, targets, sample weights). "
            f"Received: {type(probe).__name__}."
        )


def _require_batches(argument):
    is_pair = isinstance(argument, (tuple, list)) and len(argument) == 2
    if not is_pair or isinstance(argument[0], np.ndarray) or not is_whole(argument[1], 1):
        raise ValueError(
            "`reestimate_batch_norm` must be (data, number of batches), data a dataset, a PyDataset or a "
            f"list of batches, and the number an integer of at least 1. Received: {argument!r}."
        )
