"""How a gradient is encoded on the wire: `Compression.none` or `Compression.fp16`."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import tensorflow as tf

from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.communicator import Communicator


class Compression(enum.Enum):
    """The gradient's type on the wire.

    none: as it is.
    fp16: float16, half the bytes of float32. Values beyond 65504 become infinite and those below 6e-8
        zero; a `gradient_predivide_factor` above 1 makes room for large ones, one below 1 for small
        ones. Sums are formed in float32. The values of sparse gradients travel as float16 as well.
    """

    none = "none"
    fp16 = "fp16"


def check_compression(compression: Compression, op: ReduceOp) -> None:
    """Raises a `ValueError` for what is no compression, or does not go with `op`."""
    if not isinstance(compression, Compression):
        raise ValueError(
            "`compression` must be hvd.Compression.none or hvd.Compression.fp16. "
            f"Received: compression={compression!r}."
        )
    if op is ReduceOp.ADASUM and compression is not Compression.none:
        raise ValueError(
            f"`compression` must be hvd.Compression.none with op=Adasum. Received: compression={compression}."
        )


def allreduce_fp16(
    comm: Communicator,
    tensors: Sequence[tf.Tensor],
    name: str,
    *,
    prescale: float = 1.0,
    postscale: float = 1.0,
) -> list[tf.Tensor]:
    """Sums floating tensors over the ranks with float16 on the wire and float32 sums.

    The engine's own float16 allreduce sums in software, value by value, and is slower than float32. Here
    the ranks only move float16 and sum in float32 themselves: with two ranks each sends all it has;
    with more, each rank collects and sums one shard, then all gather the sums. Either way a rank sends
    2(n-1)/n of the float16 bytes, as a ring would.

    Args:
        comm: who sums.
        tensors: floating tensors of static shape; the same shapes on every rank.
        name: the collective's name.
        prescale: each rank's values are multiplied by it before they are encoded.
        postscale: the sum is multiplied by it.

    Returns:
        The sums in the tensors' own dtypes, bit for bit the same on every rank.
    """
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    half = tf.cast(tf.cast(flat, tf.float32) * prescale, tf.float16)
    if comm.size == 2:
        total = _sum_of_rows(comm.allgather(half[tf.newaxis], name), comm.size) * postscale
    else:
        total = _sharded_sum(comm, half, name, postscale)
    total = tf.cast(total, tensors[0].dtype)
    parts = tf.split(total, [tensor.shape.num_elements() for tensor in tensors])
    return [tf.reshape(p, t.shape) for p, t in zip(parts, tensors, strict=True)]


def _sharded_sum(comm, half, name, postscale):
    length = half.shape.num_elements()
    shard = -(-length // comm.size)
    padded = tf.pad(half, [[0, shard * comm.size - length]])
    mine = comm.alltoall(padded, [shard] * comm.size, f"{name}.scatter")
    total = _sum_of_rows(tf.reshape(mine, [comm.size, shard]), comm.size) * postscale
    return tf.cast(comm.allgather(tf.cast(total, tf.float16), f"{name}.gather"), tf.float32)[:length]


def _sum_of_rows(rows, count):
    # In rank order on every rank: floating sums depend on their order.
    return tf.add_n([tf.cast(rows[i], tf.float32) for i in range(count)])
