"""What an optimizer may not be told together with an exchange."""

from __future__ import annotations

import keras
from keras.optimizers import LossScaleOptimizer

from hvdext.gradients.tensors import is_overwritten
from hvdext.keras_tools.optimizers import with_members


def check_clipping(target: keras.optimizers.Optimizer, local: list[str]) -> None:
    """Refuses a norm over gradients that differ between ranks: it would scale the exchanged ones apart.

    Args:
        target: the optimizer.
        local: what `local_on_any` returned.

    Raises:
        ValueError: if a global norm would have a local part.
    """
    for optimizer in with_members(target):
        if local and optimizer.global_clipnorm:
            raise ValueError(
                "`global_clipnorm` must be None where some gradients stay local, since their norm differs "
                "between ranks: use `clipnorm`. Received: "
                f"global_clipnorm={optimizer.global_clipnorm} with local {local}."
            )


def check_keras_accumulation(outer, target, variables) -> None:
    """Refuses what Keras' own accumulation cannot do alike on all ranks."""
    steps = target.gradient_accumulation_steps
    if not steps:
        return
    overwritten = [v.path for v in variables if is_overwritten(v)]
    if isinstance(outer, LossScaleOptimizer) or overwritten:
        what = f"float8 variables {overwritten}" if overwritten else "a LossScaleOptimizer"
        raise ValueError(
            "`gradient_accumulation_steps` must be None with loss scaling or float8 layers, where ranks "
            "would fall out of step: use `backward_passes_per_step`. Received: "
            f"gradient_accumulation_steps={steps} with {what}."
        )
