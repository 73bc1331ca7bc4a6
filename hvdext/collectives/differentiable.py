"""Collectives with gradients: how `hvd.allreduce` and the others behave under `tf.GradientTape`.

The conventions are Horovod's. With n ranks, and g the gradient that arrives at the result on each rank:

    allreduce, Sum or Average   the same allreduce of g, with the same factors
    allgather                   the mean over the ranks of g, or the sum if asked for; each rank takes the
                                rows that it sent
    broadcast                   the mean over the ranks of g on the root, zero on the others
    alltoall                    the rows of g go back to where they came from
    reducescatter, Average      the ranks' blocks of g, gathered, times the factors
    reducescatter, Sum          the same times n

Those of allreduce and alltoall are exact for the sum of all ranks' losses, and so is the sum of allgather:
with them a mean of the weights' gradients is what one process computes for the mean of the losses. The mean
of allgather and broadcast is 1/n of that, that of reducescatter n times. Minimum, maximum,
product and Adasum have no gradient here: asking for one is an error. (Horovod reduces g with the same
operation, which is the gradient of nothing.)

Gradients are collectives themselves: every rank must ask for them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdext.collectives.adasum import adasum
from hvdext.collectives.compression import Compression, allreduce_fp16
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.communicator import Communicator
from hvdext.comm.names import numbered
from hvdext.common.log import warn

_MEAN_IS_MEANT = (
    "The gradient of hvd.allgather is the mean over the ranks, as Horovod's. If the gradients of the weights "
    "are averaged next, as by hvd.DistributedOptimizer, what goes through the gathered rows counts 1/n of "
    'what it does in one process: pass gradient="sum" to hvd.allgather, or "mean" if that is meant.'
)
_ENGINE_OPS = {ReduceOp.MIN: "min", ReduceOp.MAX: "max", ReduceOp.PRODUCT: "product"}


def allreduce(
    comm: Communicator,
    tensors: Sequence[tf.Tensor],
    name: str,
    *,
    op: ReduceOp = ReduceOp.SUM,
    compression: Compression = Compression.none,
    prescale: float = 1.0,
    postscale: float = 1.0,
) -> list[tf.Tensor]:
    """Combines `tensors` over the ranks; see `hvd.allreduce`.

    Args:
        comm: the ranks.
        tensors: of one dtype.
        name: the collective's name; `<name>.gradient` is that of its gradient.
        op: how.
        compression: the type on the wire.
        prescale: factor before the sum.
        postscale: factor after it.
    """

    def forward(values):
        return _reduced(comm, values, name, op, compression, prescale, postscale)

    def backward(gradients):
        if op not in (ReduceOp.SUM, ReduceOp.AVERAGE):
            raise LookupError(
                "`op` must be hvd.Average or hvd.Sum where a gradient is asked for. "
                f"Received: op={op.value} in {name}."
            )
        return allreduce(
            comm,
            gradients,
            numbered(f"{name}.gradient"),
            op=op,
            compression=compression,
            prescale=prescale,
            postscale=postscale,
        )

    return with_gradient(forward, backward, tensors)


def allgather(comm: Communicator, tensor: tf.Tensor, name: str, gradient: str | None = "mean") -> tf.Tensor:
    """Concatenates the ranks' tensors; see `hvd.allgather`."""

    def backward(gradients):
        if gradient is None and comm.size > 1 and comm.rank == 0:
            warn(_MEAN_IS_MEANT)
        op = ReduceOp.SUM if gradient == "sum" else ReduceOp.AVERAGE
        below = numbered(f"{name}.gradient.{op.value}")
        (combined,) = allreduce(comm, gradients, below, op=op)
        rows = comm.allgather(tf.shape(tensor)[:1], f"{below}.rows")
        first = tf.reduce_sum(rows[: comm.rank])
        return [tf.ensure_shape(combined[first : first + rows[comm.rank]], tensor.shape)]

    return with_gradient(lambda values: [comm.allgather(values[0], name)], backward, [tensor])[0]


def broadcast(comm: Communicator, tensor: tf.Tensor, root: int, name: str) -> tf.Tensor:
    """Returns the tensor of rank `root` (a rank of `comm`); see `hvd.broadcast`."""

    def backward(gradients):
        (mean,) = allreduce(comm, gradients, numbered(f"{name}.gradient"), op=ReduceOp.AVERAGE)
        with tf.control_dependencies([mean]):  # a session leaves out what zeros do not need
            return [tf.identity(mean if comm.rank == root else tf.zeros_like(mean))]

    return with_gradient(lambda values: comm.broadcast(values, root, name), backward, [tensor])[0]


def alltoall(
    comm: Communicator, tensor: tf.Tensor, splits: tf.Tensor, received: tf.Tensor, name: str
) -> tf.Tensor:
    """Sends `splits[r]` rows to rank r, of which `received[r]` come; see `hvd.alltoall`."""

    def backward(gradients):
        return [alltoall(comm, gradients[0], received, splits, numbered(f"{name}.gradient"))]

    return with_gradient(lambda values: [comm.alltoall(values[0], splits, name)], backward, [tensor])[0]


def reducescatter(
    comm: Communicator,
    tensor: tf.Tensor,
    name: str,
    *,
    op: ReduceOp,
    compression: Compression = Compression.none,
    prescale: float = 1.0,
    postscale: float = 1.0,
) -> tf.Tensor:
    """This rank's rows of the sum or mean; see `hvd.reducescatter`."""

    def forward(values):
        return [_scattered(comm, values[0], name, op, compression, prescale, postscale)]

    def backward(gradients):
        factor = prescale * postscale * (comm.size if op is ReduceOp.SUM else 1)
        scaled = gradients[0] * tf.constant(factor, gradients[0].dtype)
        return [allgather(comm, scaled, numbered(f"{name}.gradient"))]

    return with_gradient(forward, backward, [tensor])[0]


def with_gradient(
    forward: Callable[[list[tf.Tensor]], list[tf.Tensor]],
    backward: Callable[[list[tf.Tensor]], list[tf.Tensor]],
    tensors: Sequence[tf.Tensor],
) -> list[tf.Tensor]:
    """`forward(tensors)`, whose gradient is `backward(gradients)`; numbers that are not real have none.

    Args:
        forward: maps the tensors to the results.
        backward: maps one gradient per result to one per tensor.
        tensors: of one dtype.
    """
    if not tensors[0].dtype.is_floating and not tensors[0].dtype.is_complex:
        return forward(list(tensors))

    @tf.custom_gradient
    def collective(*values):
        # Eagerly the tape would record the collective itself, too, and build the engine's own gradient.
        results = forward([tf.stop_gradient(value) for value in values])
        return results, lambda *gradients: backward([tf.convert_to_tensor(g) for g in gradients])

    return collective(*tensors)


def _reduced(comm, tensors, name, op, compression, prescale, postscale):
    dtype = tensors[0].dtype
    if op is ReduceOp.ADASUM:
        return adasum(comm, tensors, name) if comm.size > 1 else list(tensors)
    half = compression is Compression.fp16 and dtype.is_floating and dtype.size > 2
    if op in _ENGINE_OPS:
        wire = tf.float16 if half else dtype
        results = comm.allreduce([tf.cast(t, wire) for t in tensors], name, op=_ENGINE_OPS[op])
        return [tf.cast(result, dtype) for result in results]
    if not dtype.is_floating:
        return _reduced_integers(comm, tensors, name, op, prescale, postscale)
    after = postscale / comm.size if op is ReduceOp.AVERAGE else postscale
    reduce = allreduce_fp16 if half and comm.size > 1 else type(comm).allreduce
    return reduce(comm, tensors, name, prescale=prescale, postscale=after)


def _reduced_integers(comm, tensors, name, op, prescale, postscale):
    results = comm.allreduce([_scaled_integers(t, prescale) for t in tensors], name)
    if op is ReduceOp.AVERAGE:
        results = [_truncated_mean(result, comm.size) for result in results]
    return [_scaled_integers(result, postscale) for result in results]


def _scattered(comm, tensor, name, op, compression, prescale, postscale):
    dtype = tensor.dtype
    if not dtype.is_floating:
        result = comm.reducescatter(_scaled_integers(tensor, prescale), name)
        if op is ReduceOp.AVERAGE:
            result = _truncated_mean(result, comm.size)
        return _scaled_integers(result, postscale)
    half = compression is Compression.fp16 and dtype.size > 2
    if op is ReduceOp.AVERAGE and half:  # before the sum, which the engine forms in float16
        prescale /= comm.size
    elif op is ReduceOp.AVERAGE:
        postscale /= comm.size
    wire = tf.cast(tensor * tf.constant(prescale, dtype), tf.float16) if half else tensor
    before = 1.0 if half else prescale
    result = comm.reducescatter(wire, name, prescale=before, postscale=1.0 if half else postscale)
    return tf.cast(result, dtype) * tf.constant(postscale, dtype) if half else result


def _truncated_mean(total, size):
    return tf.truncatediv(total, tf.constant(size, total.dtype)) if size > 1 else total


def _scaled_integers(tensor, factor):
    # As the engine does: the product in float64, without its fraction.
    return tensor if factor == 1 else tf.cast(tf.cast(tensor, tf.float64) * factor, tensor.dtype)
