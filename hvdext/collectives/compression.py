"""How a gradient is encoded on the wire: `Compression.none` or `Compression.fp16`."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import tensorflow as tf

from hvdext.collectives import encoded
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

    def compress(self, tensor: tf.Tensor) -> tuple[tf.Tensor, tf.DType | None]:
        """As in Horovod: what would travel, and what `decompress` must know of it.

        Args:
            tensor: of any type; integers travel as they are.
        """
        tensor = tf.convert_to_tensor(tensor)
        if self is Compression.none or not tensor.dtype.is_floating:
            return tensor, None
        return tf.cast(tensor, tf.float16), tensor.dtype

    def decompress(self, tensor: tf.Tensor, context: tf.DType | None) -> tf.Tensor:
        """As in Horovod: a tensor of the type that was compressed.

        Args:
            tensor: the first of what `compress` has returned, or a combination of such.
            context: the second.
        """
        return tensor if context is None else tf.cast(tensor, context)


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
    the ranks only move float16 and sum in float32 themselves: see `hvdext.collectives.encoded`.

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
    shards = encoded.shards_of(_single(flat) * prescale, comm.size)
    rows = encoded.scatter_shards(comm, _half(shards), name, "scatter")
    # In rank order on every rank: floating sums depend on their order.
    total = tf.add_n([_single(row) for row in tf.unstack(rows)]) * postscale
    total = encoded.gather_shards(comm, total, _half, _single, f"{name}.gather")[: flat.shape[0]]
    total = tf.cast(total, tensors[0].dtype)
    parts = tf.split(total, [tensor.shape.num_elements() for tensor in tensors])
    return [tf.reshape(p, t.shape) for p, t in zip(parts, tensors, strict=True)]


def _half(values):
    return tf.cast(values, tf.float16)


def _single(values):
    return tf.cast(values, tf.float32)
