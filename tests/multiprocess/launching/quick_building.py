"""Most of a small test's time is building graphs: ways to have less of it.

The cases under horovodrun with two ranks, and the examples, do without: they train as they do for users.
"""

import functools

import keras
import tensorflow as tf


def optimize_no_graphs() -> None:
    """From now on graphs run as they are built: halves the time to build a training step."""
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


@functools.cache  # once is enough
def build_quickly() -> None:
    """From now on graphs run as they are built, and Keras' training step is traced once instead of twice.

    Not where plain Keras is the reference: optimizers that copy the weights when they are built, as
    ScheduleFreeAdamW does, then train differently.
    """
    optimize_no_graphs()
    keras.Model.make_train_function = _with_built_optimizer(keras.Model.make_train_function)


def _with_built_optimizer(make):
    """TensorFlow traces a step that makes variables a second time, as that of an optimizer that is new."""

    @functools.wraps(make)
    def make_train_function(model, *args, **kwargs):
        if model.built and model.optimizer is not None and not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        return make(model, *args, **kwargs)

    return make_train_function
