"""How gradients are exchanged: the arguments that optimizers and tapes share, checked in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hvdext.collectives.compression import Compression, check_compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.checks import is_whole, require_number
from hvdext.common.log import warn
from hvdext.keras_tools.selection import Select, check_select


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeOptions:
    """What a `GradientExchange` is asked for, in the words of `hvd.DistributedOptimizer`.

    Attributes:
        op: Average, Sum or Adasum.
        compression: the type on the wire.
        sparse_as_dense: sum sparse gradients as dense tensors.
        gradient_predivide_factor: with Average, divide by it before the sum and by size / factor after.
        groups: a number of buckets, or lists of variables that travel together; None: by bytes.
        process_set: the ranks to combine over; None: all.
        scale_local_gradients: divide the gradients that stay local by the number of ranks, so that
            their updates keep pace with averaged ones.
        device_dense: TensorFlow device for the exchange of dense gradients; "": where they are.
        device_sparse: the same for sparse ones.
        select: which variables are exchanged; see `hvdext.keras_tools.selection`.

    Raises:
        TypeError, ValueError: if an argument breaks its rule.
    """

    op: ReduceOp = ReduceOp.AVERAGE
    compression: Compression = Compression.none
    sparse_as_dense: bool = False
    gradient_predivide_factor: float = 1.0
    groups: int | Sequence[Sequence] | None = None
    process_set: ProcessSet | None = None
    scale_local_gradients: bool = True
    device_dense: str = ""
    device_sparse: str = ""
    select: Select = None

    def __post_init__(self):
        if self.op not in (ReduceOp.AVERAGE, ReduceOp.SUM, ReduceOp.ADASUM):
            raise ValueError(f"`op` must be hvd.Average, hvd.Sum or hvd.Adasum. Received: op={self.op!r}.")
        check_compression(self.compression, self.op)
        # What is kept is Python's own: the ranks compare it, and a tape's name depends on how it prints.
        object.__setattr__(self, "gradient_predivide_factor", self._checked_factor())
        object.__setattr__(self, "groups", self._checked_groups())
        if self.process_set is not None and not isinstance(self.process_set, ProcessSet):
            raise TypeError(
                f"`process_set` must be a hvd.ProcessSet. Received: process_set={self.process_set!r}."
            )
        check_select(self.select)

    def _checked_factor(self):
        factor = require_number(
            "gradient_predivide_factor",
            self.gradient_predivide_factor,
            lambda number: 0 < number < math.inf,
            "be a positive number",
        )
        if factor != 1 and self.op is not ReduceOp.AVERAGE:
            raise ValueError(
                "`gradient_predivide_factor` needs op=Average. "
                f"Received: gradient_predivide_factor={factor} with op={self.op.value}."
            )
        return float(factor)

    def _checked_groups(self):
        groups: Any = self.groups
        if is_whole(groups, 1):
            return int(groups)
        is_lists = isinstance(groups, (list, tuple)) and all(isinstance(g, (list, tuple)) for g in groups)
        if groups is not None and not is_lists:
            raise ValueError(
                "`groups` must be a positive number of groups or a list of lists of variables. "
                f"Received: groups={groups!r}."
            )
        return groups

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], **others: Any) -> ExchangeOptions:
        """Picks the options out of the arguments of a public function, which calls them by the same names.

        Args:
            arguments: the function's `locals()`.
            **others: options that the function does not have, or not in the form that is meant here.
        """
        names = {field.name for field in dataclasses.fields(cls)} - set(others)
        return cls(**{name: arguments[name] for name in names}, **others)

    def as_arguments(self) -> dict[str, Any]:
        """The options by name, always in the same order, to be handed on to a public function."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def old_groups(num_groups: int, groups):
    """What `groups` means together with Horovod's old name for it; 0 in either is unset.

    Raises:
        ValueError: if both are given, or `num_groups` is negative.
    """
    if num_groups:
        if groups or num_groups < 0:
            raise ValueError(
                "`num_groups` must be a positive number, and left out where `groups` is given. "
                f"Received: num_groups={num_groups!r}, groups={groups!r}."
            )
        warn("`num_groups` is Horovod's old name for `groups`.")
    return num_groups or groups or None
