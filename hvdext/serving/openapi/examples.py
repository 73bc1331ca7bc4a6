"""An example of a request, made from a model's signature."""

from __future__ import annotations

import math
from typing import Any

from hvdext.serving.service import Signature, TensorSpec


def example_of(spec: TensorSpec, rows: int = 1) -> Any:
    """Nested lists that fit an input: zeros, false or texts; open lengths are 1."""
    value: Any = {"BOOL": False, "BYTES": "text"}.get(
        spec.datatype, 0.0 if spec.datatype.startswith("FP") else 0
    )
    for length in reversed((rows, *spec.shape[1:])):
        value = [value] * (length or 1)
    return value


def v2_example(signature: Signature) -> dict[str, Any]:
    """A request of the Open Inference Protocol with one row."""
    return {
        "inputs": [
            {
                "name": spec.name,
                "shape": [1, *(length or 1 for length in spec.shape[1:])],
                "datatype": spec.datatype,
                "data": example_of(spec),
            }
            for spec in signature.inputs
        ]
    }


def rows_example(signature: Signature) -> dict[str, Any]:
    """A request of TensorFlow Serving with one row."""
    rows = {spec.name: example_of(spec)[0] for spec in signature.inputs}
    only = signature.inputs[0].name
    return {"instances": [rows[only] if len(rows) == 1 else rows]}


def values(signature: Signature) -> int:
    """How many values an example holds."""
    return sum(math.prod(length or 1 for length in spec.shape[1:]) for spec in signature.inputs)
