"""What an optimizer must know of cut variables: norms, overflows and what they cannot be updated by.

Updates that work element by element need nothing: a slice is updated as the slice of the whole would be. What
looks further is done over the group here, between the gradients and Keras' own `apply`:

- `clipnorm` and `global_clipnorm` use the norm of whole gradients: sums of squares of the slices added up
  over the ranks, whole variables counted once.
- A `LossScaleOptimizer` skips on all ranks when a gradient overflows on one.
- Optimizers whose update of one element depends on others are refused.
- Every so often the ranks compare what their layers have been given and the gradients of whole variables:
  both are equal as long as all ranks of the group get the same samples.

It applies to every Keras optimizer as soon as one of its variables is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf
from keras.optimizers import LossScaleOptimizer

from hvdext.comm.communicator import Communicator
from hvdext.gradients.keras_apply import put_before
from hvdext.gradients.tensors import all_finite, clipped, is_overwritten, poisoned, squared_norm
from hvdext.keras_tools.optimizers import iterations_of, trained_by
from hvdext.keras_tools.slice_marks import mark_of
from hvdext.placement.slices.sample_check import fingerprints

CHECK_EVERY = 100  # updates between two comparisons
TOLERANCE = 1e-3  # equal samples give equal bits on machines that are alike, others differ by about 1

_PARTS = "_hvdext_parts"  # of an optimizer whose global norm is somebody else's: what it is about to apply

# Adafactor factors the squares of a matrix, Lamb scales by norms of a layer, Muon orthogonalizes a matrix.
_REFUSED = (keras.optimizers.Adafactor, keras.optimizers.Lamb, keras.optimizers.Muon)


def watch_optimizers() -> None:
    """From now on every Keras optimizer knows of cut variables; called when the first one is cut."""
    put_before(keras.optimizers.Optimizer, "slices", _before_apply)
    put_before(LossScaleOptimizer, "slices", _before_loss_scale)


def _before_apply(optimizer, gradients, trainable_variables, proceed):
    """In front of `Optimizer.apply`, which sees norms of whole gradients."""
    variables = _variables(optimizer, trainable_variables)
    comm = group_of(variables)
    if comm is not None:
        gradients = _prepared(optimizer, comm, list(gradients), variables)
    proceed(gradients, trainable_variables)


def _before_loss_scale(optimizer, gradients, trainable_variables, proceed):
    """In front of `LossScaleOptimizer.apply`: all ranks of a group see an overflow on one of them."""
    comm = group_of(_variables(optimizer, trainable_variables))
    if comm is not None:
        gradients = _overflowing_alike(comm, list(gradients))
    proceed(gradients, trainable_variables)


def group_of(variables: Sequence) -> Communicator | None:
    """The ranks that hold the other slices of those of `variables` that are cut; None if none is.

    Raises:
        ValueError: if they are cut among different ranks.
    """
    comms = {comm.ranks: comm for _, comm in filter(None, map(mark_of, variables))}
    if len(comms) > 1:
        raise ValueError(
            "`grid` must be the same for all cut layers that one optimizer trains. "
            f"Received: slices among the ranks {' and '.join(map(str, comms))}."
        )
    return next(iter(comms.values()), None)


def require_elementwise(optimizer: keras.optimizers.Optimizer, variables: Sequence) -> None:
    """Refuses what cannot update slices by themselves.

    Raises:
        ValueError: for an optimizer whose update of one element depends on others, and for one that clips by
            norm what Keras has added up.
    """
    cut = next((variable.path for variable in variables if mark_of(variable)), None)
    if isinstance(optimizer, _REFUSED):
        raise ValueError(
            "`optimizer` must update each element by itself where layers are cut, as SGD, Adam, AdamW or "
            f"RMSprop do; {type(optimizer).__name__} looks at whole matrices or layers. "
            f"Received: {optimizer.name!r} for the cut {cut!r}."
        )
    if optimizer.gradient_accumulation_steps and (optimizer.clipnorm or optimizer.global_clipnorm):
        raise ValueError(
            "`gradient_accumulation_steps` must be None with clipping by norm where layers are cut: use "
            "`backward_passes_per_step` of hvd.DistributedOptimizer. Received: gradient_accumulation_steps="
            f"{optimizer.gradient_accumulation_steps} on {optimizer.name!r}."
        )


@dataclass(frozen=True)
class _Parts:
    """Which of the gradients that an optimizer is about to apply are slices', and of whose group."""

    comm: Communicator | None = None
    cut: tuple[bool, ...] = ()


def leave_global_norm(optimizer: keras.optimizers.Optimizer) -> None:
    """Has somebody else clip an optimizer's gradients by their global norm, who asks `squares_of` for it."""
    setattr(optimizer, _PARTS, _Parts())


def squares_of(optimizer: keras.optimizers.Optimizer, gradients: Sequence) -> tf.Tensor:
    """The square of the norm of whole gradients, slices' over their group: float32, a scalar.

    All ranks of the group call it while they apply the same.

    Args:
        optimizer: one for which `leave_global_norm` was called.
        gradients: what Keras clips: those that `apply` was given, without None.
    """
    parts: _Parts = getattr(optimizer, _PARTS)
    zero = tf.zeros([], tf.float32)
    if parts.comm is None:
        return sum(map(squared_norm, gradients), zero)
    pairs = list(zip(gradients, parts.cut, strict=True))
    cut = sum((squared_norm(g) for g, is_cut in pairs if is_cut), zero)
    (total,) = parts.comm.allreduce([cut], "hvdext.slices.update.norm")
    return total + sum((squared_norm(g) for g, is_cut in pairs if not is_cut), zero)


def _prepared(optimizer, comm, gradients, variables):
    require_elementwise(optimizer, variables)
    _check_same_samples(optimizer, comm, gradients, variables)
    if optimizer.clipnorm:
        squares = [None if g is None else squared_norm(g) for g in gradients]
        squares = _over_slices(comm, squares, variables)
        return [
            g if s is None else clipped(g, s, optimizer.clipnorm)
            for g, s in zip(gradients, squares, strict=True)
        ]
    if optimizer.global_clipnorm and hasattr(optimizer, _PARTS):  # who clips asks `squares_of`
        applied = [v for g, v in zip(gradients, variables, strict=True) if g is not None]
        cut = tuple(mark_of(v) is not None for v in applied if not is_overwritten(v))
        setattr(optimizer, _PARTS, _Parts(comm, cut))
        return gradients
    if optimizer.global_clipnorm:
        present = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        zero = tf.zeros([], tf.float32)
        cut = sum((squared_norm(g) for g, v in present if mark_of(v)), zero)
        whole = sum((squared_norm(g) for g, v in present if not mark_of(v)), zero)
        (total,) = comm.allreduce([cut], "hvdext.slices.update.norm")
        total += whole
        return [clipped(g, total, optimizer.global_clipnorm) for g in gradients]
    return gradients


def _over_slices(comm, squares, variables):
    """The sums of squares of whole gradients, one message for all that are cut."""
    places = [
        i for i, (s, v) in enumerate(zip(squares, variables, strict=True)) if s is not None and mark_of(v)
    ]
    if not places:
        return squares
    (totals,) = comm.allreduce([tf.stack([squares[i] for i in places])], "hvdext.slices.update.norms")
    for place, total in zip(places, tf.unstack(totals), strict=True):
        squares[place] = total
    return squares


def _check_same_samples(optimizer, comm, gradients, variables):
    """Stops all ranks if they have seen different samples; every `CHECK_EVERY` updates."""
    whole = [g for g, v in zip(gradients, variables, strict=True) if g is not None and not mark_of(v)]

    def compare():
        squares = sum(map(squared_norm, whole), tf.zeros([], tf.float32))
        everyone = comm.allgather(
            tf.stack([squares, *fingerprints()])[tf.newaxis], "hvdext.slices.update.samples"
        )
        apart = tf.reduce_max(everyone, 0) - tf.reduce_min(everyone, 0)
        limits = tf.concat(
            [[TOLERANCE * tf.reduce_max(everyone[:, 0])], TOLERANCE * tf.ones_like(apart[1:])], 0
        )
        differ = tf.reduce_any(apart > limits)  # False where one of them is not finite
        rule = (
            "The ranks that hold the slices of one layer must get the same samples in the same order: shard "
            "data within `grid.data_parallel()`, and give all of them the same seeds. Received: squared "
            "norms of the gradients, then fingerprints of the layers' inputs, on the ranks "
            f"{list(comm.ranks)}:"
        )
        tf.debugging.Assert(tf.logical_not(differ), [rule, everyone], summarize=64)

    due = tf.equal(tf.convert_to_tensor(iterations_of(optimizer)) % CHECK_EVERY, 0)
    if not tf.executing_eagerly():
        tf.cond(due, compare, lambda: None)
    elif due:
        compare()
    else:
        fingerprints()


def _overflowing_alike(comm, gradients):
    """`gradients`, the first of them NaN on every rank if any of any rank is not finite."""
    (ranks,) = comm.allreduce([tf.cast(all_finite(gradients), tf.float32)], "hvdext.slices.update.finite")
    return poisoned(gradients, unless=ranks == comm.size)


def _variables(optimizer, trainable_variables):
    if trainable_variables is not None:
        return list(trainable_variables)
    return trained_by(optimizer)
