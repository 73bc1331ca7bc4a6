"""How the ranks' values become one: `hvd.Average`, `hvd.Sum`, `hvd.Adasum` and others."""

from __future__ import annotations

import enum


class ReduceOp(enum.Enum):
    """How the ranks' values become one.

    AVERAGE: their mean. SUM: their sum. ADASUM: adaptive summation, between the two, see
    `hvdext.collectives.adasum`; needs a power-of-two number of ranks. MIN, MAX, PRODUCT: element by
    element; for `hvd.allreduce` and `hvd.grouped_allreduce`, not for gradients.
    """

    AVERAGE = "Average"
    SUM = "Sum"
    ADASUM = "Adasum"
    MIN = "Min"
    MAX = "Max"
    PRODUCT = "Product"
