"""Several tensors reduced as one message of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def allreduce_as_one(ops: Any, tensors: Sequence[tf.Tensor], name: str, **how: Any) -> list[tf.Tensor]:
    """Reduces `tensors`, of one dtype, through the engine.

    Args:
        ops: `horovod.tensorflow.mpi_ops`.
        tensors: the same shapes on every rank. Of several an engine without the operation compares the size.
        name: of the message.
        **how: what the engine's allreduce takes: `reduce_op`, `prescale_factor`, `postscale_factor`,
            `process_set_id`.
    """
    if _takes_pieces(ops):
        return list(ops.MPI_LIB.horovod_pieces_allreduce(tensors, name=name, **how))
    flat = tensors[0] if len(tensors) == 1 else tf.concat([tf.reshape(t, [-1]) for t in tensors], 0)
    total = ops.MPI_LIB.horovod_allreduce(flat, name=name, ignore_name_scope=True, **how)
    if len(tensors) == 1:
        return [total]
    parts = tf.split(total, [tf.size(t) for t in tensors])
    return [tf.reshape(p, tf.shape(t)) for p, t in zip(parts, tensors, strict=True)]


def _takes_pieces(ops: Any) -> bool:
    """Not an engine as Horovod publishes it, nor one whose tensors are in a GPU's memory."""
    on_gpu = ops.cuda_built() or ops.rocm_built()
    return not on_gpu and hasattr(ops.MPI_LIB, "horovod_pieces_allreduce")
