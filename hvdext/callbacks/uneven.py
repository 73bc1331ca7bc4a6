"""Ranks with different numbers of batches in one epoch."""

from __future__ import annotations

import keras

from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.gradients.apply_hook import ApplyHook, hook_of, hooks_of
from hvdext.keras_tools.models import flat_layers, is_built, optimizers_of, retrace
from hvdext.keras_tools.optimizers import build


class UnevenBatches(keras.callbacks.Callback):
    """Lets ranks train different numbers of batches per epoch, also none at all, in `model.fit`.

    A rank that has run out of batches takes part in the others' updates with nothing to contribute until
    all have, and before validation: averages are over the ranks that still have a batch, and all ranks
    hold the same weights after every epoch. The learning rate of such an update is that of the first
    rank with a batch. Variables that are not exchanged wait for the rank's own next batch.

    Put it before the callbacks that compare or save anything at the end of an epoch. The model must be
    built (begin with a `keras.Input`), since a rank without a batch cannot know its shapes; a rank that has
    none at all passes empty arrays or an empty `tf.data.Dataset`, as Keras refuses empty generators and
    PyDatasets.

    Costs one small exchange per update, which runs beside the backward pass, and one per epoch.

    Raises:
        ValueError: when training begins, on every rank alike: if the model is not built, its optimizer is
            not from `hvd.DistributedOptimizer`, is not its only one of that kind or accumulates by Keras'
            `gradient_accumulation_steps`, or a layer exchanges numbers within the forward pass
            (`hvd.SyncBatchNormalization`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_training = False
        self._has_joined = False
        self._has_switched_on = False

    def set_model(self, model):
        super().set_model(model)
        hook = hook_of(model.optimizer)
        if hook is not None and not hook.expects_uneven_batches and not hook.has_keras_accumulation:
            self._has_switched_on = True
            self._switch(True)

    def on_train_begin(self, logs=None):
        problem = _problem(self.model, self.params.get("steps"))
        agreement.check(current(), "hvd.callbacks.UnevenBatches", {"problem": problem}, problem)
        build(self.model.optimizer, self.model.trainable_variables)
        self._is_training = True

    def on_epoch_begin(self, epoch, logs=None):
        self._has_joined = False

    def on_test_begin(self, logs=None):
        if self._is_training:
            self._join()
        else:  # `evaluate` on its own
            self._switch_back()

    def on_epoch_end(self, epoch, logs=None):
        self._join()

    def on_train_end(self, logs=None):
        self._is_training = False
        self._switch_back()

    def on_predict_begin(self, logs=None):
        self._switch_back()

    def _join(self):
        if not self._has_joined:
            self._has_joined = True
            self._hook().join(self.model.optimizer, self.model.trainable_variables)

    def _switch_back(self):
        if self._has_switched_on and not self._is_training:
            self._has_switched_on = False
            self._switch(False)

    def _switch(self, expected):
        self._hook().expect_uneven_batches(expected)
        retrace(self.model, "train")  # with the roll call, or without

    def _hook(self) -> ApplyHook:
        hook = hook_of(self.model.optimizer)
        assert hook is not None, "on_train_begin() has checked it"
        return hook


def _problem(model, steps):
    hook = hook_of(model.optimizer)
    if hook is None:
        return (
            "`UnevenBatches` needs a model compiled with hvd.DistributedOptimizer; one among its attributes "
            f"is not enough. Received: the optimizer {model.optimizer.name!r}."
        )
    others = [one.name for one in optimizers_of(model) if one is not model.optimizer and hooks_of(one)]
    if others:
        return (
            "`UnevenBatches` needs a model with one optimizer that exchanges gradients, since a rank without "
            "a batch cannot tell which of them is next: give all ranks as many batches (hvd.data.shard). "
            f"Received: {model.optimizer.name!r}, and {others} among the model's attributes."
        )
    if hook.has_keras_accumulation:
        return (
            "`UnevenBatches` needs an optimizer that does not accumulate by Keras: use "
            "`backward_passes_per_step`. Received: gradient_accumulation_steps="
            f"{hook.optimizer.gradient_accumulation_steps}."
        )
    if not is_built(model):
        return (
            "`UnevenBatches` needs a built model, since a rank without a batch cannot know its shapes: begin "
            f"it with a keras.Input or call it once. Received: the unbuilt {model.name!r}."
        )
    if model.run_eagerly and steps == 0:
        return (
            "`UnevenBatches` needs a batch on every rank with `run_eagerly=True`, where Keras makes a rank's "
            "metrics with its first batch. Received: no batches."
        )
    talking = [layer.name for layer in flat_layers(model) if getattr(layer, "exchanges_forward", False)]
    if talking:
        return (
            "`UnevenBatches` needs layers that exchange nothing within the forward pass, such as "
            f"keras.layers.BatchNormalization. Received: hvd.SyncBatchNormalization layers {talking}."
        )
    return None
