"""What Keras' optimizers are made of: the one inside, its members, its variables, its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras.optimizers import LossScaleOptimizer

from hvdext.keras_tools.replacing import replace


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


def members_of(optimizer) -> list:
    """The optimizers that a `MultiOptimizer` is made of; none of any other.

    One that chooses by a function knows its members once it is built. Like the next two, this looks into
    a `LossScaleOptimizer`.
    """
    return list(getattr(innermost(optimizer), "optimizers", []))


def with_members(optimizer) -> list:
    """The innermost optimizer, and its members where it is a `MultiOptimizer`."""
    return [innermost(optimizer), *members_of(optimizer)]


def updaters_of(optimizer) -> list:
    """Those that update variables: the members of a `MultiOptimizer`, or the innermost optimizer itself."""
    target = innermost(optimizer)
    return list(getattr(target, "optimizers", [target]))


def learning_rate_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """What the learning rate comes from: a Keras variable if it can be set, else a schedule or function.

    Unlike `optimizer.learning_rate`, which is a schedule's value at the present step.
    """
    return optimizer._learning_rate


def iterations_of(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """The variable that counts the calls of `apply`.

    Unlike `optimizer.iterations`, which counts as one those that `gradient_accumulation_steps` puts together.
    """
    return optimizer._iterations


def trained_by(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables that an optimizer was built for, in its order; none before that."""
    return list(optimizer._trainable_variables) if optimizer.built else []


def clip_by(optimizer: keras.optimizers.Optimizer, clip: Callable[[list], list]) -> None:
    """Has `clip` do what Keras' clipping of gradients did in `optimizer`.

    Args:
        optimizer: the optimizer itself, not one around it.
        clip: takes all gradients, some of which may be None, and returns them clipped.
    """
    replace(optimizer, _clip_gradients=clip)


def keep_gradients_apart(optimizer: keras.optimizers.Optimizer) -> None:
    """Leaves out Keras' sum over the replicas of a `tf.distribute` strategy, where there is one replica.

    All gradients would go through one operation, on one device.

    Args:
        optimizer: the optimizer itself, not one around it.
    """
    replace(optimizer, _all_reduce_sum_gradients=list)


def keeps_velocity(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the momentum that an optimizer keeps, if any, holds gradients times learning rate."""
    return isinstance(optimizer, (keras.optimizers.SGD, keras.optimizers.RMSprop))


def velocities_of(optimizer: keras.optimizers.Optimizer) -> list[tf.Variable]:
    """The variables that hold gradients times learning rate; none without momentum or before it is built."""
    if not optimizer.built or not keeps_velocity(optimizer):
        return []
    is_sgd = isinstance(optimizer, keras.optimizers.SGD)
    found = optimizer.momentums if is_sgd else optimizer._momentums
    return [velocity.value for velocity in found if velocity is not None]


def before_clipping(optimizer: keras.optimizers.Optimizer, prepare: Callable[[list], list]) -> None:
    """Has gradients prepared before Keras clips and applies them.

    Args:
        optimizer: with `gradient_accumulation_steps` this is done with the sums, not with each micro-batch.
        prepare: takes the gradients and returns those to be clipped.
    """
    clip = optimizer._clip_gradients

    def prepare_and_clip(gradients):
        return clip(prepare(gradients))

    optimizer._clip_gradients = prepare_and_clip


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
