"""What users pass to collectives: checks, names, and the same error on all ranks where values do not fit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from hvdext.collectives.compression import Compression, check_compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.mismatch import MismatchError, mismatch
from hvdext.comm.names import cleaned, numbered
from hvdext.comm.process_sets import ProcessSet
from hvdext.comm.wire_types import can_be_reduced
from hvdext.common.checks import require_choice
from hvdext.common.log import warn

_UNNAMED = "unnamed"
_RULE = "must fit together on all ranks."


class UnsupportedError(ValueError, NotImplementedError):
    """A combination of arguments that nobody has built; Horovod's own is the second of the two."""


def comm_of(process_set, op=None) -> Communicator:
    """The ranks of `process_set`, or all; checks that `op` can work with as many."""
    comm = current()
    if process_set is not None:
        if not isinstance(process_set, ProcessSet):
            raise TypeError(f"`process_set` must be a hvd.ProcessSet. Received: process_set={process_set!r}.")
        comm = comm.subset(process_set.ranks)
    if op is ReduceOp.ADASUM and comm.size & (comm.size - 1):
        raise ValueError(f"`op=Adasum` needs a power-of-two number of ranks. Received: {comm.size} ranks.")
    return comm


def place_of_root(comm: Communicator, root_rank: int) -> int:
    """The place of `root_rank` within `comm`: a global rank, or among all ranks one as `hvd.rank()` counts.

    The two differ where a grid's axis stands for all ranks (`hvd.Grid.data_parallel`).

    Raises:
        ValueError: if it is not one of the ranks.
    """
    ranks = tuple(range(comm.size)) if comm is current() else comm.ranks
    if isinstance(root_rank, bool) or root_rank not in ranks:
        raise ValueError(
            f"`root_rank` must be one of the ranks {list(ranks)}. Received: root_rank={root_rank!r}."
        )
    return ranks.index(root_rank)


def user_name(kind: str, name: str | None) -> str:
    """The collective's name for what a user passed as `name`.

    Raises:
        ValueError: if `name` is neither None nor a string with something in it.
    """
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"`name` must be a string that is not empty, or None. Received: name={name!r}.")
    return f"hvdext.user.{kind}.{_UNNAMED if name is None else cleaned(name)}"


def collective_name(kind, name):
    """`user_name`, numbered within the graph being built."""
    return numbered(user_name(kind, name))


def op_of(op, average):
    """`op`, where it may be missing or given as Horovod's old `average`."""
    if average is None:
        return ReduceOp.AVERAGE if op is None else op
    if op is not None:
        raise ValueError(
            "`average` must be left out where `op` is given, which replaces it. "
            f"Received: average={average!r}, op={op!r}."
        )
    warn("`average` is deprecated: pass op=hvd.Average or op=hvd.Sum.", DeprecationWarning)
    return ReduceOp.AVERAGE if average else ReduceOp.SUM


def check_reduction(op, compression, prescale, postscale, ops):
    """Raises a `ValueError` for settings that are wrong or do not go together."""
    if op not in ops:
        names = ", ".join(f"hvd.{known.value}" for known in ops)
        raise ValueError(f"`op` must be one of {names}. Received: op={op!r}.")
    check_compression(compression, op)
    for label, factor in [("prescale_factor", prescale), ("postscale_factor", postscale)]:
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not math.isfinite(factor):
            raise ValueError(f"`{label}` must be a finite number. Received: {label}={factor!r}.")
        if factor != 1 and op not in (ReduceOp.AVERAGE, ReduceOp.SUM):
            raise ValueError(
                f"`{label}` must be 1 unless `op` is hvd.Average or hvd.Sum. "
                f"Received: {label}={factor} with op={op.value}."
            )


def options_of(op, compression, prescale, postscale):
    """Checked settings as the keywords of `hvdext.collectives.differentiable`."""
    return {
        "op": op,
        "compression": compression,
        "prescale": float(prescale),
        "postscale": float(postscale),
    }


def converted(value, argument):
    """`value` as a tensor of numbers, or as `tf.IndexedSlices` of tensors."""
    if isinstance(value, tf.IndexedSlices):
        return tf.IndexedSlices(*map(tf.convert_to_tensor, (value.values, value.indices)), value.dense_shape)
    try:
        tensor = tf.convert_to_tensor(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{argument}` must hold numbers. Received: {value!r} ({error}).") from error
    kind = tensor.dtype
    if not (kind.is_floating or kind.is_integer or kind.is_complex or kind.is_bool):
        raise TypeError(f"`{argument}` must hold numbers. Received: dtype {kind.name}.")
    return tensor


def dense(tensor, argument):
    """`tensor`, if it is not `tf.IndexedSlices`."""
    if isinstance(tensor, tf.IndexedSlices):
        raise TypeError(f"`{argument}` must hold dense tensors. Received: {tensor!r}.")
    return tensor


def with_rows(tensor, argument):
    """`tensor`, if it has an axis 0."""
    if dense(tensor, argument).shape.rank == 0:
        raise ValueError(
            f"`{argument}` must have at least one axis, along which the ranks' rows are counted: a scalar x "
            "goes as [x]. Received: a scalar."
        )
    return tensor


def gradient_of_rows(gradient):
    """`gradient`, if `allgather` can take it."""
    require_choice("gradient", gradient, (None, "mean", "sum"))
    return gradient


def scatterable(tensor, argument):
    """`tensor`, if `reducescatter` can take it."""
    if not can_be_reduced(tensor.dtype) or tensor.dtype == tf.bool:
        raise TypeError(f"`{argument}` must hold real numbers. Received: dtype {tensor.dtype.name}.")
    return with_rows(tensor, argument)


def checked_splits(splits):
    """`splits` as int64 of shape (ranks,)."""
    shares = tf.convert_to_tensor(splits)
    if not shares.dtype.is_integer or shares.shape.rank != 1:
        raise ValueError(
            "`splits` must be integers with one axis. "
            f"Received: dtype {shares.dtype.name}, shape {shares.shape}."
        )
    return tf.cast(shares, tf.int64)


def row_counts(comm, tensor, splits, name):
    """How many rows this rank sends to each and receives from each; an error on all ranks if any is wrong."""
    rows = tf.shape(tensor, tf.int64)[0]
    given = tf.fill([comm.size], rows // comm.size) if splits is None else splits
    # Not ==, which compares the objects in graphs of TensorFlow 1.
    fits = tf.logical_and(tf.equal(tf.size(given), comm.size), tf.reduce_all(given >= 0))
    fits = tf.logical_and(fits, tf.equal(tf.reduce_sum(given), rows))
    # A rank whose splits are wrong still sends a row of the right length, since the others wait for it.
    sent = tf.where(fits, tf.pad(given, [[0, comm.size]])[: comm.size], -1)
    everyone = tf.reshape(comm.allgather(sent, name), [comm.size, comm.size])
    rule = (
        f"`splits` must be {comm.size} numbers, not negative, that add up to the rows of `tensor`; without "
        f"`splits`, {comm.size} must divide the rows. Received otherwise on the ranks"
    )
    wrong = tf.gather(tf.constant(comm.ranks), tf.where(everyone[:, 0] < 0)[:, 0])
    mine = ["; on this rank: splits", given, "for rows:", rows]
    if tf.executing_eagerly():
        if tf.size(wrong) > 0:
            text = f"{mine[0]} {given.numpy().tolist()} {mine[2]} {int(rows)}"
            raise mismatch(f"{rule} {wrong.numpy().tolist()}{text}.")
    else:
        check = tf.debugging.Assert(tf.equal(tf.size(wrong), 0), [rule, wrong, *mine])
        with tf.control_dependencies([check]):
            sent, everyone = tf.identity(sent), tf.identity(everyone)
    return tf.cast(sent, tf.int32), tf.cast(everyone[:, comm.rank], tf.int32)


def reducible(value, argument, comm, how):
    """`value`, if `allreduce` can take it with the options `how`."""
    op, dtype = how["op"], value.dtype
    linear = op in (ReduceOp.AVERAGE, ReduceOp.SUM)
    if not can_be_reduced(dtype) or (dtype == tf.bool and (op is ReduceOp.AVERAGE or _factor(how) != 1)):
        raise TypeError(f"`{argument}` must hold real numbers. Received: dtype {dtype.name}, op={op.value}.")
    if isinstance(value, tf.IndexedSlices):
        if not linear:
            raise UnsupportedError(
                f"`op` must be hvd.Average or hvd.Sum for tf.IndexedSlices. Received: op={op.value}."
            )
        if not dtype.is_floating and _factor(how) != 1:
            raise TypeError(
                f"`{argument}` must be floating in tf.IndexedSlices that `prescale_factor` or "
                f"`postscale_factor` multiply. Received: {dtype.name}."
            )
        return value
    if op is ReduceOp.ADASUM and not dtype.is_floating:
        raise TypeError(f"`{argument}` must be floating for op=Adasum. Received: dtype {dtype.name}.")
    cut = op is ReduceOp.ADASUM or (linear and how["compression"] is Compression.fp16)
    if cut and comm.size > 1 and not value.shape.is_fully_defined():
        raise ValueError(
            f"`{argument}` must have a static shape for Adasum and Compression.fp16; tf.ensure_shape can "
            f"give it one. Received: shape {value.shape}."
        )
    return value


def _factor(how):
    return how["prescale"] * how["postscale"]


def group(comm, tensors, function, check, same_rows):
    """The group's tensors, compared over the ranks where that is possible: eagerly.

    Two groups of one size may hold different tensors, and one collective more on a rank would wait for ever.
    """
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"`tensors` must be a list or tuple. Received: {tensors!r}.")
    problem: Exception | None = None
    values: list[Any] = []
    facts: dict[str, object] = {"number of tensors": len(tensors)}
    try:
        values = [check(converted(tensor, "tensors")) for tensor in tensors]
        facts |= {f"tensor {i}": _described(value, same_rows) for i, value in enumerate(values)}
    except (TypeError, ValueError) as error:
        problem = error
    compare(comm, function, facts, problem)
    return values


def compare(comm: Communicator, subject: str, facts: dict[str, object], problem: Exception | None) -> None:
    """Compares `facts` over the ranks, eagerly, and raises this rank's own problem.

    Args:
        comm: who compares.
        subject: what they describe; see `agreement.check`.
        facts: what must agree.
        problem: what is wrong with this rank's arguments. The others, who would wait for it, are told first.

    Raises:
        MismatchError: on every rank alike, if anything differs, also if one rank alone has a problem.
        TypeError, ValueError: `problem`.
    """
    told = facts if problem is None else facts | {"error": str(problem)}
    if tf.executing_eagerly():
        agreement.check(comm, subject, told)
    if problem is not None:
        raise problem


def _described(value, same_rows):
    if isinstance(value, tf.IndexedSlices):
        return f"slices of {value.dtype.name}"
    shape = list(value.shape) if same_rows else [None, *value.shape[1:]]
    return f"{value.dtype.name} {shape}"


@contextlib.contextmanager
def own_complaint(comm: Communicator, name: str) -> Iterator[None]:
    """Tells the other ranks, who would wait in collective `name`, that this one's value breaks a rule.

    Raises:
        MismatchError: if only some ranks' values do so, as on the others.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        if tf.executing_eagerly() and comm.size > 1 and not _all_complain(comm, name):
            raise mismatch(f"Arguments {_RULE} Received on {_me(comm)}: {error}") from error
        raise


def _all_complain(comm, name):
    try:
        # Something that fits nobody's value; the engine then ends the collective on every rank.
        comm.allgather(tf.zeros([0] * 7, tf.bool), name)
    except tf.errors.OpError:
        return False
    return True


@contextlib.contextmanager
def engine_complaint(comm: Communicator, argument: str) -> Iterator[None]:
    """The engine's word on ranks that do not fit together, as an error about `argument`."""
    try:
        yield
    except MismatchError:
        raise
    except (tf.errors.FailedPreconditionError, tf.errors.InvalidArgumentError) as error:
        lines = [line for line in str(error.message).splitlines() if "ismatched" in line]
        raise mismatch(
            f"`{argument}` and the other arguments {_RULE} Received on {_me(comm)} "
            f"what does not fit the others: {lines[0] if lines else error.message}"
        ) from error


def _me(comm):
    return f"rank {comm.ranks[comm.rank]}"
