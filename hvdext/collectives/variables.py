"""One rank's values become everybody's."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from hvdext.collectives.arguments import compare, place_of_root
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.names import numbered
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.selection import content_of


@suggests_keywords
@without_autograph
def broadcast_variables(
    variables: Sequence,
    root_rank: int = 0,
    process_set: ProcessSet | None = None,
    inplace: bool = False,
) -> None:
    """Assigns rank `root_rank`'s values to `variables` on every rank.

    Within a `tf.function` it does so in each run of the function's graph.

    As with Keras' `set_weights`, an adapted `Normalization` goes on with what it has derived from its
    variables before: call its `finalize_state()` afterwards. The callbacks of hvdext do so.

    Args:
        variables: Keras or TensorFlow variables; the same shapes and dtypes on every rank.
        root_rank: the global rank whose values count.
        process_set: among which ranks; None: all.
        inplace: accepted for Horovod's sake. There it lets the engine write into the variables' memory;
            here the values are assigned, with the same result either way.

    Raises:
        RuntimeError: in a graph of TensorFlow 1.
        TypeError: if `variables` holds something else.
        ValueError: if `root_rank` is not one of the ranks; on every rank alike, if the ranks' variables
            differ (within a `tf.function` a `tf.errors.InvalidArgumentError` when it runs).
    """
    comm = current()
    if process_set is not None:
        comm = comm.subset(process_set.ranks)
    spread(comm, variables, root_rank, "broadcast_variables", numbered("hvdext.broadcast.variables"))


def spread(comm: Communicator, variables: Sequence, root_rank: int, subject: str, name: str) -> list:
    """Assigns rank `root_rank`'s values to `variables`, compared over the ranks first; returns the values.

    Args:
        comm: among which ranks.
        variables: as for `broadcast_variables`.
        root_rank: as for `broadcast_variables`.
        subject: what the user has called, for the message.
        name: the collective's name.

    Raises:
        RuntimeError, TypeError, ValueError: as `broadcast_variables`.
    """
    if not tf.compat.v1.executing_eagerly_outside_functions():
        raise RuntimeError(
            f"`hvd.{subject}` must be called eagerly or in a `tf.function`, since nothing would run what it "
            "adds to a graph of TensorFlow 1. Received: a call while such a graph is built."
        )
    facts: dict[str, object] = {"root_rank": root_rank}
    problem: Exception | None = None
    try:
        root, variables = place_of_root(comm, root_rank), _require_variables(variables)
        facts |= {"number of variables": len(variables)}
        facts |= {f"variable {i}": content_of(v) for i, v in enumerate(variables)}
    except (TypeError, ValueError) as error:
        problem = error
    compare(comm, subject, facts, problem)
    if comm.size == 1 or not variables:
        return [tf.convert_to_tensor(variable) for variable in variables]
    with tf.control_dependencies(agreement.check_in_graph(comm, subject, facts, name)):
        received = comm.broadcast([tf.convert_to_tensor(variable) for variable in variables], root, name)
        for variable, value in zip(variables, received, strict=True):
            variable.assign(value)
    return received


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
    if hasattr(variables, "variables") or not hasattr(variables, "__iter__"):
        instead = " Pass its `variables`." if hasattr(variables, "variables") else ""
        raise TypeError(
            "`variables` must be a list of Keras or TensorFlow variables, such as model.variables. "
            f"Received: {variables!r} of type {type(variables).__name__}.{instead}"
        )
    found = list(variables)
    strangers = [v for v in found if not isinstance(v, (keras.Variable, tf.Variable))]
    if strangers:
        raise TypeError(f"`variables` must hold Keras or TensorFlow variables. Received: {strangers}.")
    return found
