"""Gradients of a pipeline's stages, clipped by the norm of all stages' gradients, or found to overflow."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf
from keras.optimizers import LossScaleOptimizer

from hvdext.comm.communicator import Communicator
from hvdext.gradients.apply_hook import hook_of
from hvdext.gradients.tensors import all_finite, clipped
from hvdext.keras_tools.optimizers import clip_by, with_members
from hvdext.placement.slices.updates import leave_global_norm, squares_of


def clip_over_stages(optimizer: keras.optimizers.Optimizer, comm: Communicator, name: str) -> None:
    """Makes `global_clipnorm` mean the norm over all stages.

    Args:
        optimizer: the stage's, without the `LossScaleOptimizer` around it.
        comm: the pipeline's ranks.
        name: the pipeline's.

    Raises:
        ValueError: where the norm cannot be made over all stages.
    """
    members = with_members(optimizer)
    if comm.size == 1 or not any(member.global_clipnorm for member in members):
        return
    hook = hook_of(optimizer)
    if len(members) > 1 or (hook is not None and hook.has_keras_accumulation):
        raise ValueError(
            "`global_clipnorm` must be None for a pipeline with a MultiOptimizer, or with a "
            "DistributedOptimizer that has gradient_accumulation_steps. "
            f"Received: global_clipnorm={[member.global_clipnorm for member in members]}."
        )

    leave_global_norm(optimizer)

    def clip(gradients):
        mine = squares_of(optimizer, gradients)
        (total,) = comm.allreduce([mine], f"hvdext.pipeline.{name}.norm")
        # Keras' clipping makes slices dense; optimizers take rows that come twice otherwise than their sum.
        return [clipped(tf.convert_to_tensor(g), total, optimizer.global_clipnorm) for g in gradients]

    clip_by(optimizer, clip)


def count_overflow(optimizer: keras.optimizers.Optimizer, gradients: Sequence) -> tf.Tensor | None:
    """1 if a gradient of this rank is not finite, else 0; None if nobody asks.

    Args:
        optimizer: the stage's.
        gradients: what it is about to apply.
    """
    if not isinstance(optimizer, LossScaleOptimizer):
        return None
    return 1.0 - tf.cast(all_finite(gradients), tf.float32)
