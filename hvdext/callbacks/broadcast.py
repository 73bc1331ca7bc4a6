"""All ranks start from one rank's variables."""

from __future__ import annotations

import inspect
import warnings
import weakref

import keras
import tensorflow as tf

from hvdext import agreement
from hvdext.comm import current
from hvdext.optimizer import build, exchanges
from hvdext.variables import broadcast_variables, model_variables


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives every rank the root's model and optimizer variables, once per model, before the first update.

    A model that has its variables when training begins gets them then. One that is built by its first
    batch is called on zeros of that batch's shape just before its first training step, and gets them
    before anything is computed. Random generators keep their own states.

    When training begins it also compares over the ranks how many epochs and steps per epoch they are about
    to train, since a rank that stops earlier would leave the others waiting.

    Args:
        root_rank: the rank whose variables count.
        device: accepted for Horovod's sake; the exchange happens where the variables are.

    Raises:
        ValueError: when training begins, on every rank alike: if epochs or steps differ, the models
            differ or `root_rank` does not exist.
        RuntimeError: when training begins, if `hvd.init()` has not been called.
    """

    def __init__(self, root_rank: int, device: str = ""):
        super().__init__()
        self._root_rank = root_rank
        self._done_for: weakref.ref = weakref.ref(self)  # the model that has been broadcast
        del device

    def on_train_begin(self, logs=None):
        comm = current()
        plan = {"epochs": self.params.get("epochs"), "steps per epoch": self.params.get("steps")}
        agreement.check(comm, "model.fit", plan)
        if self._is_done():
            return
        optimizer = self.model.optimizer
        if comm.size > 1 and comm.rank == 0 and not exchanges(optimizer):
            warnings.warn(
                f"The optimizer {optimizer.name!r} exchanges no gradients: pass it through "
                "hvd.DistributedOptimizer, unless the ranks' parameters are synchronised otherwise.",
                stacklevel=2,
            )
        if _is_built(self.model):
            self._broadcast()
        else:
            self._broadcast_before_first_step()

    def _broadcast_before_first_step(self):
        """Puts the broadcast in front of the model's training step, which sees the first batch."""
        model, plain_step = self.model, self.model.train_step

        def step(data):
            if not self._is_done():
                with tf.init_scope():  # eagerly, also while Keras traces the step
                    _call_on_zeros(model, data)
                    self._broadcast()
            return plain_step(data)

        model.train_step = step
        model.make_train_function(force=True)
        model.train_step = plain_step

    def _broadcast(self):
        build(self.model.optimizer, self.model.trainable_variables)
        broadcast_variables(model_variables(self.model), self._root_rank)
        self._done_for = weakref.ref(self.model)

    def _is_done(self):
        return self._done_for() is self.model


def _is_built(model):
    return model.built and all(layer.built for layer in model._flatten_layers())


def _call_on_zeros(model, data):
    """Builds every layer that `model` calls, as Keras advises: by calling it on a batch of data."""
    inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    zeros = tf.nest.map_structure(
        lambda x: tf.zeros([1 if n is None else n for n in x.shape], x.dtype), inputs
    )
    accepts_training = "training" in inspect.signature(model.call).parameters
    model(zeros, training=False) if accepts_training else model(zeros)
