"""Ranks with different numbers of batches: who contributes to a step, and what the others hand in.

A rank that has run out of batches goes on taking part in the exchanges, with nothing to contribute, until no
rank has a batch left. Each step begins with a roll call: every rank says whether it contributes and gathers
the others' answers. The average is then over those that do, and every rank applies it, so that the
weights stay equal. When nobody answers, all ranks know that the epoch is over. Unlike the engine's own
join, this needs no end: it works in every epoch, for sparse, compressed and Adasum exchanges, and within
process sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.mismatch import mismatch
from hvdext.gradients.accumulation import kind_of
from hvdext.gradients.exchange import GradientExchange
from hvdext.keras_tools.optimizers import learning_rate_of, with_members
from hvdext.keras_tools.selection import described


class RollCall:
    """Counts, step by step, the ranks that contribute, and gives all of them one learning rate.

    Args:
        exchange: what combines the gradients, among the ranks that are called.
        optimizer: whose hyperparameters follow those of the first rank that contributes: a callback that
            changes the learning rate with the batches does nothing on a rank that has none left.
    """

    def __init__(self, exchange: GradientExchange, optimizer: keras.optimizers.Optimizer):
        self._exchange = exchange
        self._optimizer = optimizer

    def take(self, present: bool, weight: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns how many ranks contribute to this step, and their weights' sum: float64, alike on all.

        Args:
            present: whether this rank does.
            weight: what it counts for, a float64 scalar; None: for nothing.
        """
        comm = self._exchange.comm()
        settings = _hyperparameters(self._optimizer)
        values = [tf.cast(tf.convert_to_tensor(variable), tf.float64) for variable in settings]
        weight = tf.zeros([], tf.float64) if weight is None else weight
        mine = tf.stack([tf.constant(float(present), tf.float64), weight, *values])
        everyone = comm.allgather(mine[tf.newaxis], f"hvdext.grad.{self._exchange.name}.rollcall")
        everyone = tf.ensure_shape(everyone, [comm.size, 2 + len(settings)])
        count = tf.reduce_sum(everyone[:, 0])
        first = tf.gather(everyone, tf.argmax(everyone[:, 0]))
        for variable, own, theirs in zip(settings, values, tf.unstack(first)[2:], strict=True):
            variable.assign(tf.cast(tf.where(count > 0, theirs, own), variable.dtype))
        return count, tf.reduce_sum(everyone[:, 1])


def _hyperparameters(optimizer):
    """What callbacks may change between steps: variables, not schedules, which follow `iterations`."""
    found = []
    for member in with_members(optimizer):
        for value in (learning_rate_of(member), getattr(member, "momentum", None)):
            if isinstance(value, (keras.Variable, tf.Variable)):
                found.append(value)
    return found


@dataclass(frozen=True)
class Kind:
    """What one gradient is made of, so that a rank that has never seen it can make an empty one.

    Attributes:
        dtype: of its numbers.
        index_dtype: of its indices; None for a dense gradient.
    """

    dtype: str
    index_dtype: str | None = None


def kinds_of(gradients: Sequence[Any]) -> list[Kind | None]:
    """Describes gradients; None where there is none."""
    return [_kind(gradient) for gradient in gradients]


def _kind(gradient):
    match kind_of(gradient):
        case "no":
            return None
        case "sparse":
            return Kind(gradient.values.dtype.name, gradient.indices.dtype.name)
        case _:
            return Kind(gradient.dtype.name)


def common_kinds(
    comm: Communicator, subject: str, kinds: list[Kind | None] | None, variables: Sequence
) -> list[Kind | None] | None:
    """What the gradients are made of, told by a rank that has some; compares the variables of all.

    Ranks without a gradient have compared nothing before. All of them call it.

    Args:
        comm: the ranks.
        subject: whose gradients they are.
        kinds: this rank's, or None.
        variables: the variables the gradients belong to.

    Raises:
        ValueError: on every rank alike, if the variables differ.
    """
    mine = {f"variable {i}": told for i, told in enumerate(described(variables))}
    everyone = comm.allgather_object((kinds, mine), "hvdext.agreement.kinds")
    if any(theirs != mine for _, theirs in everyone):
        raise mismatch(agreement.disagreement(subject, [facts for _, facts in everyone], comm.ranks))
    return next((kinds for kinds, _ in everyone if kinds is not None), None)


def empty_gradients(kinds: Sequence[Kind | None], variables: Sequence) -> list:
    """Gradients that add nothing: zeros, or no slices at all.

    Args:
        kinds: one per variable.
        variables: the variables the gradients belong to.
    """
    return [_empty(kind, variable) for kind, variable in zip(kinds, variables, strict=True)]


def _empty(kind, variable):
    if kind is None:
        return None
    shape = tuple(variable.shape)
    if kind.index_dtype is None:
        return tf.zeros(shape, kind.dtype)
    return tf.IndexedSlices(
        tf.zeros([0, *shape[1:]], kind.dtype),
        tf.zeros([0], kind.index_dtype),
        tf.constant(shape, kind.index_dtype),
    )
