"""One rank's values become everybody's."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from hvdext.collectives.arguments import place_of_root
from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.selection import content_of


@suggests_keywords
def broadcast_variables(
    variables: Sequence,
    root_rank: int = 0,
    process_set: ProcessSet | None = None,
    inplace: bool = False,
) -> None:
    """Assigns rank `root_rank`'s values to `variables` on every rank.

    As with Keras' `set_weights`, an adapted `Normalization` goes on with what it has derived from its
    variables before: call its `finalize_state()` afterwards. The callbacks of hvdext do so.

    Args:
        variables: Keras or TensorFlow variables; the same shapes and dtypes on every rank.
        root_rank: the global rank whose values count.
        process_set: among which ranks; None: all.
        inplace: accepted for Horovod's sake. There it lets the engine write into the variables' memory;
            here the values are assigned, with the same result either way.

    Raises:
        ValueError: if `root_rank` is not one of the ranks; on every rank alike, if the ranks' variables
            differ.
    """
    variables = _require_variables(variables)
    comm = current()
    if process_set is not None:
        comm = comm.subset(process_set.ranks)
    root = place_of_root(comm, root_rank)
    facts: dict[str, object] = {"root_rank": root_rank, "number of variables": len(variables)}
    for i, v in enumerate(variables):
        facts[f"variable {i}"] = content_of(v)
    agreement.check(comm, "broadcast_variables", facts)
    if comm.size == 1 or not variables:
        return
    values = [tf.convert_to_tensor(variable) for variable in variables]
    for variable, value in zip(
        variables, comm.broadcast(values, root, "hvdext.broadcast.variables"), strict=True
    ):
        variable.assign(value)


@suggests_keywords
def broadcast_global_variables(root_rank: int) -> None:
    """Refuses: TensorFlow 2 keeps no list of all variables. Horovod refuses as well in eager TensorFlow.

    Args:
        root_rank: the global rank whose values were meant.

    Raises:
        RuntimeError: always; the message names what to call instead.
    """
    current()
    raise RuntimeError(
        "hvd.broadcast_global_variables() has no global variables to send in TensorFlow 2. Use "
        f"`hvd.broadcast_variables(model.variables, root_rank={root_rank!r})`, or pass "
        f"`hvd.callbacks.BroadcastGlobalVariablesCallback({root_rank!r})` to `model.fit`."
    )


@suggests_keywords
def largest_difference(variables: Sequence) -> float:
    """How far the ranks' variables are apart; every rank must call it.

    For the end of a run or a test: every rank gathers all ranks' values, as float64.

    Args:
        variables: Keras or TensorFlow variables; the same shapes and dtypes on every rank.

    Returns:
        The largest absolute difference of any element between any two ranks, the same on every rank; 0.0
        means that all bits that count are equal. NaN if any value is NaN or infinite.
    """
    variables = _require_variables(variables)
    comm = current()
    values = [np.ravel(tf.convert_to_tensor(v).numpy()).astype(np.float64) for v in variables]
    flat = np.concatenate([*values, np.zeros(1)])
    everyone = comm.allgather(tf.constant(flat[np.newaxis]), "hvdext.difference").numpy()
    return float(np.max(np.max(everyone, axis=0) - np.min(everyone, axis=0)))


def _require_variables(variables):
    found = list(variables) if isinstance(variables, (list, tuple)) else None
    if found is None and not hasattr(variables, "variables") and hasattr(variables, "__iter__"):
        found = list(variables)
    if found is None or not all(isinstance(v, (keras.Variable, tf.Variable)) for v in found):
        instead = " Pass its `variables`." if hasattr(variables, "variables") else ""
        shown = variables if found is None else [v for v in found if not hasattr(v, "assign")]
        raise TypeError(
            "`variables` must be a list of Keras or TensorFlow variables, such as model.variables. "
            f"Received: {shown!r} of type {type(variables).__name__}.{instead}"
        )
    return found
