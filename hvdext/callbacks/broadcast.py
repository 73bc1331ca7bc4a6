"""All ranks start from one rank's variables."""

from __future__ import annotations

import inspect

import keras
import tensorflow as tf

from hvdext.collectives.arguments import place_of_root
from hvdext.collectives.variables import broadcast_variables
from hvdext.collectives.vocabularies import broadcast_vocabularies
from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.comm.once import Once
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_whole
from hvdext.common.log import warn
from hvdext.gradients.apply_hook import exchanges, hook_of
from hvdext.keras_tools.derived import derive_anew, settle
from hvdext.keras_tools.models import (
    flat_layers,
    has_call,
    is_built,
    model_variables,
    optimizers_of,
    unbuilt_layers,
)
from hvdext.keras_tools.optimizers import build, trained_by, updaters_of
from hvdext.keras_tools.selection import identity_of
from hvdext.keras_tools.slots import slots_of
from hvdext.keras_tools.train_step import trace_with
from hvdext.sync.attachment import attached


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Gives every rank the root's model and optimizer variables, once per model, before the first update.

    A model that has its variables when training begins gets them then. One that is built by its first
    batch is called on zeros of that batch's shape just before its first training step, and gets them
    before anything is computed. Vocabularies and bins of preprocessing layers in it go along (not those of
    layers that only map the data). Random generators keep their own states.

    When training begins it also compares over the ranks how many epochs and steps per epoch they are about
    to train, since a rank that stops earlier would leave the others waiting (an asynchronous `ParameterSync`
    does not mind).

    Args:
        root_rank: the rank whose variables count.
        device: accepted for Horovod's sake; the exchange happens where the variables are.
        local_variables: a variable, or several, that each rank keeps its own values of, and of what an
            optimizer keeps beside them; they may have other shapes on other ranks.

    Raises:
        ValueError: if `root_rank` is no rank or `local_variables` holds something else; when training begins,
            on every rank alike: if epochs or steps differ, the models differ, a layer cannot hold the root's
            vocabulary or `root_rank` does not exist.
        RuntimeError: when training begins, if `hvd.init()` has not been called.
    """

    @suggests_keywords
    def __init__(self, root_rank: int, device: str = "", local_variables=None):
        super().__init__()
        self._root_rank = require_whole("root_rank", root_rank, 0)
        self._once = Once()
        self._local: set[int] = set()
        del device
        if local_variables is None:
            local_variables = []
        elif not isinstance(local_variables, (list, tuple)):
            local_variables = [local_variables]
        for variable in local_variables:
            self.register_local_var(variable)

    def register_local_var(self, var) -> None:
        """Lets each rank keep its own value of `var`, a Keras or TensorFlow variable."""
        if not isinstance(var, (keras.Variable, tf.Variable)):
            raise ValueError(f"`local_variables` must be variables. Received: {var!r}.")
        self._local.add(identity_of(var))

    def on_train_begin(self, logs=None):
        comm = current()
        agreement.check(comm, "model.fit", self._plan())
        if self._is_done():
            return
        optimizers = optimizers_of(self.model)
        alone = not any(map(exchanges, optimizers)) and not attached(self.model)
        if alone and comm.size > 1 and comm.rank == 0:
            names = " and ".join(repr(optimizer.name) for optimizer in optimizers)
            warn(
                f"The optimizer {names} exchanges no gradients: pass it through "
                "hvd.DistributedOptimizer, unless the ranks' parameters are synchronised otherwise."
            )
        if not has_call(self.model):
            _require_parts(comm, self.model)
        broadcast_vocabularies(comm, self.model, place_of_root(comm, self._root_rank))
        if is_built(self.model):
            self._broadcast()
            settle(self.model)
        else:
            # What has been adapted is built, and compared before the first step.
            adapted = [layer for layer in flat_layers(self.model) if hasattr(layer, "finalize_state")]
            _build_alike(comm, adapted)
            broadcast_variables([v for layer in adapted for v in layer.variables], self._root_rank)
            derive_anew(adapted)
            self._broadcast_before_first_step()

    def _plan(self):
        if any(sync.is_asynchronous for sync in attached(self.model)):
            return {}
        plan = {"epochs": self.params.get("epochs")}
        hook = hook_of(self.model.optimizer)
        if hook is None or not hook.expects_uneven_batches:
            plan["steps per epoch (hvd.callbacks.UnevenBatches lets them differ)"] = self.params.get("steps")
        return plan

    def _broadcast_before_first_step(self):
        """Puts the broadcast in front of the model's training step, which sees the first batch."""
        model = self.model

        def broadcasting(plain_step):
            def step(data):
                if not self._is_done():
                    with tf.init_scope():  # eagerly, also while Keras traces the step
                        _call_on_zeros(model, data)
                        self._broadcast()
                        derive_anew([model])  # nothing else to settle: this step is the first to be traced
                return plain_step(data)

            return step

        trace_with(model, broadcasting)

    def _broadcast(self):
        if not any(map(exchanges, _others_of(self.model))):  # else it is one that Keras has made up
            build(self.model.optimizer, self.model.trainable_variables)
        local = self._local | self._slots_of_local()
        shared = [v for v in model_variables(self.model) if identity_of(v) not in local]
        broadcast_variables(shared, self._root_rank)
        self._once.note(self.model, current())

    def _slots_of_local(self):
        """What optimizers keep beside a local variable is this rank's own too, and may have its shape."""
        updaters = [u for optimizer in optimizers_of(self.model) for u in updaters_of(optimizer)]
        return {
            identity_of(slot.variable)
            for updater in updaters
            for slot in slots_of(updater)
            if identity_of(trained_by(updater)[slot.index]) in self._local
        }

    def _is_done(self):
        return self._once.is_done(self.model, current())


def _others_of(model):
    return [optimizer for optimizer in optimizers_of(model) if optimizer is not model.optimizer]


def _build_alike(comm, layers):
    """Builds, on every rank, what has been adapted on some."""
    mine = [layer.get_build_config() if layer.built else None for layer in layers]
    everyone = comm.allgather_object(mine, "hvdext.agreement.adapted")
    for layer, *configs in zip(layers, *everyone, strict=False):
        known = [config for config in configs if config is not None]
        if known and not layer.built:
            layer.build_from_config(known[0])


def _require_parts(comm, model):
    """Layers of a model that nobody can call must be built when training begins."""
    missing, problem = unbuilt_layers(model), None
    if missing:
        problem = (
            "A model without a `call` of its own must be made of built layers and models, so that all "
            f"ranks can start alike. Received: {model.name!r} with {missing}, which are not: give each an "
            "Input, or call it once."
        )
    agreement.check(comm, "model.fit", {}, problem)


def _call_on_zeros(model, data):
    """Builds every layer that `model` calls, as Keras advises: by calling it on a batch of data."""
    inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
    zeros = tf.nest.map_structure(
        lambda x: tf.zeros([1 if n is None else n for n in x.shape], x.dtype), inputs
    )
    accepts_training = "training" in inspect.signature(model.call).parameters
    model(zeros, training=False) if accepts_training else model(zeros)
