"""What Keras' optimizers are made of: the one inside, its members, its variables, its settings."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import tensorflow as tf
from keras.optimizers import LossScaleOptimizer


def build(optimizer: keras.optimizers.Optimizer, variables: Sequence) -> None:
    """Gives `optimizer` its variables, named as Keras names them, unless it has them."""
    if not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(list(variables))


def loss_scale(outer):
    """What the loss was multiplied by: a float32 scalar tensor or a number."""
    if isinstance(outer, LossScaleOptimizer):
        return tf.convert_to_tensor(outer.dynamic_scale)
    return outer.loss_scale_factor or 1


def innermost(optimizer):
    """The optimizer inside a `LossScaleOptimizer`, or `optimizer` itself."""
    return optimizer.inner_optimizer if isinstance(optimizer, LossScaleOptimizer) else optimizer


def configuration(optimizer):
    """The settings of `optimizer` that must agree among ranks, to compare by their `repr`."""
    try:
        return _plain_settings(optimizer.get_config())
    except NotImplementedError:  # a schedule of the user's own that cannot be saved; it can train
        return "unknown"


def _plain_settings(config):
    """The part of a Keras configuration that must agree and can be compared.

    Names count up per process, a learning rate may come from a checkpoint that only the root has read
    (it is a variable, and broadcast), and functions print their address.
    """
    if isinstance(config, dict):
        skipped = ("name", "learning_rate")
        return {
            key: _plain_settings(value)
            for key, value in config.items()
            if key not in skipped or isinstance(value, dict)
        }
    return config if isinstance(config, (str, int, float, bool, type(None))) else type(config)
