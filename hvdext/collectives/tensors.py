"""Collectives for users: `hvd.allreduce(loss)`, `hvd.allgather(predictions)` and the others.

All of them work eagerly, in a `tf.function` and within Keras' `train_step`, take Python numbers, arrays,
tensors and variables, and have gradients (`hvdext.collectives.differentiable` says which). Every rank of the
process set must call them, in the same order.

A call without `name` is named by its place among the calls of its kind in the graph, which is the same on
ranks that run the same program. Give a name where ranks do not, and use few of them: each stays known to
the engine and to hvdext for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hvdext.collectives import differentiable
from hvdext.collectives.arguments import (
    check_reduction,
    checked_splits,
    collective_name,
    comm_of,
    converted,
    dense,
    engine_complaint,
    gradient_of_rows,
    group,
    op_of,
    options_of,
    own_complaint,
    place_of_root,
    reducible,
    row_counts,
    scatterable,
    with_rows,
)
from hvdext.collectives.compression import Compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.collectives.variables import spread
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import also_called, suggests_keywords
from hvdext.keras_tools.autograph import without_autograph


@suggests_keywords
@also_called(tensor="value")  # in horovod.tensorflow
@without_autograph
def allreduce(
    value: Any,
    name: str | None = None,
    average: bool | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    op: ReduceOp | None = None,
    compression: Compression = Compression.none,
    *,
    device_dense: str = "",
    device_sparse: str = "",
    process_set: ProcessSet | None = None,
    ignore_name_scope: bool = False,
) -> tf.Tensor | tf.IndexedSlices:
    """Combines the ranks' values element by element.

    Args:
        value: real numbers; the same shape and dtype on every rank. `tf.IndexedSlices` are gathered, and
            ranks may hold different numbers of slices; as in Horovod, an average of integers in slices is
            floating (float32 of 8 and 16 bits, float64 of more).
        name: the collective's name; None: by position.
        average: Horovod's old argument. True: `op=hvd.Average`, False: `op=hvd.Sum`.
        prescale_factor: with Average and Sum, each rank's value is multiplied by it first.
        postscale_factor: with Average and Sum, the result is multiplied by it.
        op: hvd.Average (default), Sum, Adasum, Min, Max or Product. As in Horovod, an average of integers
            and a product of integers with a factor lose their fraction.
        compression: `hvd.Compression.fp16` sends floats as float16; with Average and Sum their shape
            must then be static.
        device_dense: TensorFlow device for the exchange; "": where the value is.
        device_sparse: the same for `tf.IndexedSlices`.
        process_set: among which ranks; None: all.
        ignore_name_scope: of no effect: names never contain TensorFlow's scopes.

    Returns:
        A tensor like `value`, the same bits on every rank; for `tf.IndexedSlices` the slices of all ranks.

    Raises:
        ValueError, TypeError: if an argument breaks its rule; eagerly also if the ranks' values do not fit
            together, then on every rank.
        LookupError: if a gradient is asked for with another `op` than Average and Sum.
    """
    op = op_of(op, average)
    check_reduction(op, compression, prescale_factor, postscale_factor, list(ReduceOp))
    comm = comm_of(process_set, op)
    label = collective_name("allreduce", name)
    how = options_of(op, compression, prescale_factor, postscale_factor)
    with own_complaint(comm, label):
        tensor = reducible(converted(value, "value"), "value", comm, how)
    with engine_complaint(comm, "value"):
        return _allreduce_all(comm, [tensor], label, device_dense, device_sparse, how)[0]


@suggests_keywords
@without_autograph
def grouped_allreduce(
    tensors: Sequence,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = None,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[tf.Tensor | tf.IndexedSlices]:
    """`allreduce` of several values, those of one dtype in one message.

    Args:
        tensors: what `allreduce` takes; the same number, shapes and dtypes on every rank.
        average: as for `allreduce`.
        device_dense: as for `allreduce`.
        device_sparse: as for `allreduce`.
        compression: as for `allreduce`.
        op: as for `allreduce`.
        prescale_factor: as for `allreduce`.
        postscale_factor: as for `allreduce`.
        process_set: as for `allreduce`.
        ignore_name_scope: as for `allreduce`.
        name: as for `allreduce`.

    Returns:
        One result for each of `tensors`.

    Raises:
        ValueError, TypeError, LookupError: as `allreduce`.
    """
    op = op_of(op, average)
    check_reduction(op, compression, prescale_factor, postscale_factor, list(ReduceOp))
    comm = comm_of(process_set, op)
    how = options_of(op, compression, prescale_factor, postscale_factor)
    values = group(
        comm, tensors, "grouped_allreduce", lambda tensor: reducible(tensor, "tensors", comm, how), True
    )
    label = collective_name("grouped_allreduce", name)
    with engine_complaint(comm, "tensors"):
        return _allreduce_all(comm, values, label, device_dense, device_sparse, how)


@suggests_keywords
@also_called(tensor="value")  # in horovod.tensorflow
@without_autograph
def allgather(
    value: Any,
    name: str | None = None,
    *,
    process_set: ProcessSet | None = None,
    ignore_name_scope: bool = False,
    gradient: str | None = None,
) -> tf.Tensor:
    """Concatenates the ranks' values along axis 0, in rank order.

    Args:
        value: numbers with at least one axis; ranks may differ in the length of axis 0 only.
        name: the collective's name; None: by position.
        process_set: among which ranks; None: all.
        ignore_name_scope: of no effect: names never contain TensorFlow's scopes.
        gradient: how what arrives at a rank's rows on all ranks is combined: "mean" as Horovod does, or
            "sum", which a loss over gathered rows (contrastive, in-batch negatives) needs before a
            `DistributedOptimizer` that averages. None: "mean", with one warning.

    Returns:
        All ranks' rows.

    Raises:
        ValueError, TypeError: if an argument breaks its rule; eagerly also if the ranks' values do not fit
            together, then on every rank.
    """
    comm = comm_of(process_set)
    label = collective_name("allgather", name)
    with own_complaint(comm, label):
        combined = gradient_of_rows(gradient)
        tensor = with_rows(converted(value, "value"), "value")
    with engine_complaint(comm, "value"):
        return differentiable.allgather(comm, tensor, label, combined)


@suggests_keywords
@without_autograph
def grouped_allgather(
    tensors: Sequence,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet | None = None,
    gradient: str | None = None,
) -> list[tf.Tensor]:
    """`allgather` of several values.

    Args:
        tensors: what `allgather` takes, the same number on every rank; dtypes may differ.
        name: as for `allgather`.
        ignore_name_scope: as for `allgather`.
        process_set: as for `allgather`.
        gradient: as for `allgather`.

    Returns:
        One result for each of `tensors`.

    Raises:
        ValueError, TypeError: as `allgather`.
    """
    comm = comm_of(process_set)
    label = collective_name("grouped_allgather", name)
    with own_complaint(comm, label):
        combined = gradient_of_rows(gradient)
    values = group(comm, tensors, "grouped_allgather", lambda tensor: with_rows(tensor, "tensors"), False)
    with engine_complaint(comm, "tensors"):
        return [differentiable.allgather(comm, v, f"{label}.part{i}", combined) for i, v in enumerate(values)]


@suggests_keywords
@also_called(tensor="value")  # in horovod.tensorflow
@without_autograph
def broadcast(
    value: Any,
    root_rank: int,
    name: str | None = None,
    *,
    process_set: ProcessSet | None = None,
    ignore_name_scope: bool = False,
) -> tf.Tensor:
    """Returns rank `root_rank`'s value on every rank.

    Args:
        value: numbers; the same shape and dtype on every rank.
        root_rank: the global rank whose value counts.
        name: the collective's name; None: by position.
        process_set: among which ranks; None: all.
        ignore_name_scope: of no effect: names never contain TensorFlow's scopes.

    Raises:
        ValueError, TypeError: if an argument breaks its rule; eagerly also if the ranks' values do not fit
            together, then on every rank.
    """
    comm = comm_of(process_set)
    label = collective_name("broadcast", name)
    with own_complaint(comm, label):
        root = place_of_root(comm, root_rank)
        tensor = dense(converted(value, "value"), "value")
    with engine_complaint(comm, "value"):
        return differentiable.broadcast(comm, tensor, root, label)


@suggests_keywords
@without_autograph
def broadcast_(
    variables: Sequence, root_rank: int, name: str | None = None, process_set: ProcessSet | None = None
) -> list[tf.Tensor]:
    """Assigns rank `root_rank`'s values to `variables` on every rank.

    Args:
        variables: Keras or TensorFlow variables; the same number, shapes and dtypes on every rank.
        root_rank: the global rank whose values count.
        name: the collective's name; None: by position.
        process_set: among which ranks; None: all.

    Returns:
        The variables' new values.

    Raises:
        ValueError, TypeError: if an argument breaks its rule; eagerly also if the ranks' variables differ,
            then on every rank.
    """
    comm = comm_of(process_set)
    return spread(comm, variables, root_rank, "broadcast_", collective_name("broadcast_", name))


@suggests_keywords
@also_called(tensor="value")  # in horovod.tensorflow
@without_autograph
def reducescatter(
    value: Any,
    name: str | None = None,
    op: ReduceOp = ReduceOp.AVERAGE,
    *,
    device_dense: str = "",
    compression: Compression = Compression.none,
    process_set: ProcessSet | None = None,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> tf.Tensor:
    """Combines the ranks' values element by element; each rank gets its block of rows.

    Args:
        value: real numbers with at least one axis; the same shape and dtype on every rank.
        name: the collective's name; None: by position.
        op: hvd.Average or hvd.Sum.
        device_dense: TensorFlow device for the exchange; "": where the value is.
        compression: `hvd.Compression.fp16` sends floats as float16.
        process_set: among which ranks; None: all.
        ignore_name_scope: of no effect: names never contain TensorFlow's scopes.
        prescale_factor: each rank's value is multiplied by it first.
        postscale_factor: the result is multiplied by it.

    Returns:
        This rank's rows, the blocks in rank order. Where the ranks do not divide the rows, the first ranks
        get one row more than the others.

    Raises:
        ValueError, TypeError: if an argument breaks its rule; eagerly also if the ranks' values do not fit
            together, then on every rank.
    """
    check_reduction(op, compression, prescale_factor, postscale_factor, [ReduceOp.AVERAGE, ReduceOp.SUM])
    comm = comm_of(process_set)
    label = collective_name("reducescatter", name)
    how = options_of(op, compression, prescale_factor, postscale_factor)
    with own_complaint(comm, label):
        tensor = scatterable(converted(value, "value"), "value")
    with engine_complaint(comm, "value"), tf.device(device_dense or None):
        return differentiable.reducescatter(comm, tensor, label, **how)


@suggests_keywords
@without_autograph
def grouped_reducescatter(
    tensors: Sequence,
    device_dense: str = "",
    compression: Compression = Compression.none,
    op: ReduceOp = ReduceOp.AVERAGE,
    process_set: ProcessSet | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    *,
    name: str | None = None,
) -> list[tf.Tensor]:
    """`reducescatter` of several values.

    Args:
        tensors: what `reducescatter` takes; the same number, shapes and dtypes on every rank.
        device_dense: as for `reducescatter`.
        compression: as for `reducescatter`.
        op: as for `reducescatter`.
        process_set: as for `reducescatter`.
        prescale_factor: as for `reducescatter`.
        postscale_factor: as for `reducescatter`.
        name: as for `reducescatter`.

    Returns:
        One result for each of `tensors`.

    Raises:
        ValueError, TypeError: as `reducescatter`.
    """
    check_reduction(op, compression, prescale_factor, postscale_factor, [ReduceOp.AVERAGE, ReduceOp.SUM])
    comm = comm_of(process_set)
    how = options_of(op, compression, prescale_factor, postscale_factor)
    values = group(
        comm, tensors, "grouped_reducescatter", lambda tensor: scatterable(tensor, "tensors"), True
    )
    label = collective_name("grouped_reducescatter", name)
    with engine_complaint(comm, "tensors"), tf.device(device_dense or None):
        return [
            differentiable.reducescatter(comm, tensor, f"{label}.part{i}", **how)
            for i, tensor in enumerate(values)
        ]


@suggests_keywords
@without_autograph
def alltoall(
    tensor: Any,
    splits: Sequence[int] | tf.Tensor | None = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet | None = None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Sends some rows of `tensor` to each rank and returns the rows received, in rank order.

    Args:
        tensor: numbers with at least one axis; ranks may differ in the length of axis 0 only.
        splits: integers, shape (ranks,): how many rows go to each rank, in rank order; together all rows.
            None: equal shares. Either all ranks pass splits or none.
        name: the collective's name; None: by position.
        ignore_name_scope: of no effect: names never contain TensorFlow's scopes.
        process_set: among which ranks; None: all.

    Returns:
        The rows; with `splits` a pair: the rows, and how many of them came from each rank (int32).

    Raises:
        ValueError, TypeError: if an argument breaks its rule; eagerly also if the ranks' tensors do not fit
            together or a rank's splits do not fit its rows, then on every rank.
        tf.errors.InvalidArgumentError: on every rank, if a rank's splits do not fit in a `tf.function`.
    """
    comm = comm_of(process_set)
    label = collective_name("alltoall", name)
    with own_complaint(comm, f"{label}.splits"):
        value = with_rows(converted(tensor, "tensor"), "tensor")
        shares = None if splits is None else checked_splits(splits)
    with engine_complaint(comm, "tensor"):
        sent, received = row_counts(comm, value, shares, f"{label}.splits")
        result = differentiable.alltoall(comm, value, sent, received, label)
    return result if splits is None else (result, received)


# -- the work ------------------------------------------------------------------------------------------


def _allreduce_all(comm, values, name, device_dense, device_sparse, how):
    results: list[Any] = list(values)
    kinds: dict[str, list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, tf.IndexedSlices):
            # One value alone has the name of a dense one: the engine then notices where ranks differ.
            label = name if len(values) == 1 else f"{name}.sparse{i}"
            with tf.device(device_sparse or None):
                results[i] = _gathered_slices(comm, value, label, **how)
        else:
            kinds.setdefault(value.dtype.name, []).append(i)
    for kind, members in kinds.items():
        label = name if len(kinds) == 1 else f"{name}.{kind}"
        with tf.device(device_dense or None):
            combined = differentiable.allreduce(comm, [values[i] for i in members], label, **how)
        for i, tensor in zip(members, combined, strict=True):
            results[i] = tensor
    return results


def _gathered_slices(comm, slices, name, *, op, compression, prescale, postscale):
    dtype = slices.values.dtype
    half = compression is Compression.fp16 and dtype.is_floating and dtype.size > 2
    factor = prescale * postscale / (comm.size if op is ReduceOp.AVERAGE else 1)
    wire = tf.cast(slices.values, tf.float16 if half else dtype)
    values = tf.cast(differentiable.allgather(comm, wire, name), dtype)
    indices = comm.allgather(slices.indices, f"{name}.indices")
    if dtype.is_floating:
        values *= tf.constant(factor, dtype)
    elif op is ReduceOp.AVERAGE:
        values /= tf.constant(comm.size, dtype)  # floating, as Horovod's
    return tf.IndexedSlices(values, indices, slices.dense_shape)
