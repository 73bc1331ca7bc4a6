"""What survives a lost rank: models, optimizers, variables and plain values, committed to host memory."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from hvdext.collectives.variables import broadcast_variables
from hvdext.collectives.vocabularies import broadcast_vocabularies
from hvdext.comm.current import current
from hvdext.elastic.failure import recoverable
from hvdext.gradients.apply_hook import exchanges, hooks_of
from hvdext.keras_tools.derived import settle
from hvdext.keras_tools.models import is_built, model_variables, optimizers_of, retrace
from hvdext.keras_tools.optimizers import build
from hvdext.keras_tools.selection import path_of

_REMOVED = 1  # what the launcher announces: a sum of 1 (hosts removed) and 2 (hosts added)


class State:
    """Plain values that are committed, restored and synchronised together.

    Args:
        **kwargs: the values, which become attributes of the state. They must be such that `pickle` and
            `copy.deepcopy` take them. Later changes, also inside a list or dict, count from the next commit.

    Attributes:
        trackers: the callbacks that write the progress of the latest `fit` into this state, by their classes;
            who commits asks them first.

    Raises:
        ValueError: if a name is one that the state needs for itself.
    """

    def __init__(self, **kwargs: Any):
        self.trackers: dict[type, keras.callbacks.Callback] = {}
        taken = [name for name in kwargs if hasattr(self, name)]
        if taken:
            raise ValueError(
                f"`kwargs` must have names that {type(self).__name__} does not use itself. Received: {taken}."
            )
        self._names = tuple(kwargs)
        self._set(kwargs)
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._reset_callbacks: list[Callable[[], None]] = []
        self._keep()

    def save(self) -> None:
        """Keeps a copy of all values, in this process."""
        self._keep()

    def restore(self) -> None:
        """Goes back to what `save`, `commit` or `sync` has kept."""
        self._set(copy.deepcopy(self._kept))

    def sync(self) -> None:
        """Gives every rank the current values of rank 0, and saves them. Every rank must call it."""
        with recoverable():
            values = current().broadcast_object(self._values(), 0, "hvdext.elastic.values")
        self._names = tuple(values)
        self._set(values)
        self._keep()

    def commit(self) -> None:
        """Saves, then looks for changed hosts. Every rank must call it, at the same step.

        Raises:
            HostsUpdatedInterrupt: on every rank alike, if hosts have come or gone; `hvd.elastic.run`
                takes it.
        """
        self.save()
        self.check_host_updates()

    def check_host_updates(self) -> None:
        """Looks for changed hosts without saving. Every rank must call it, at the same step.

        Raises:
            HostsUpdatedInterrupt: as `commit`.
        """
        heard = 0
        while not self._news.empty():
            heard |= self._news.get()
        with recoverable():  # the launcher tells rank 0 only
            (news,) = current().broadcast([tf.constant(heard)], 0, "hvdext.elastic.news")
        if int(news):
            from horovod.common.exceptions import HostsUpdatedInterrupt

            # Where ranks have only left, the others are alike already.
            raise HostsUpdatedInterrupt(int(news) == _REMOVED)

    def register_reset_callbacks(self, callbacks: Sequence[Callable[[], None]]) -> None:
        """Has functions without arguments called whenever rank and size have changed.

        They run on every rank that was there before and stays, and must make the same change on all: where
        ranks were only taken away, no synchronisation follows.
        """
        self._reset_callbacks.extend(callbacks)

    def reset(self) -> None:
        """Forgets what was made for the old number of ranks; for states of one's own to extend."""

    def on_reset(self) -> None:
        """Called by `hvd.elastic.run` when rank and size have changed."""
        self._news = queue.SimpleQueue()
        self.reset()
        for callback in self._reset_callbacks:
            callback()

    def on_hosts_updated(self, timestamp: int, update_res: int) -> None:
        """Called, in a thread of Horovod's, when the launcher announces a change of hosts."""
        self._news.put(int(update_res))

    def _values(self):
        return {name: getattr(self, name) for name in self._names}

    def _set(self, values):
        for name, value in values.items():
            setattr(self, name, value)

    def _keep(self):
        self._kept = copy.deepcopy(self._values())


class _VariableState(State):
    """Values and variables; a subclass says which."""

    def restore(self) -> None:
        """As in `State`, the variables included."""
        for variable, value in self._copies:
            variable.assign(value)
        super().restore()

    def sync(self) -> None:
        """As in `State`, the variables included.

        Raises:
            ValueError: on every rank alike, if the ranks' variables differ in number, shape or dtype.
        """
        with recoverable():
            broadcast_variables(self._shared(), 0)
        super().sync()

    def _keep(self):
        # Read anew each time: a model or optimizer may have got more variables.
        variables = [*self._shared(), *self._private()]
        self._copies = [(v, tf.convert_to_tensor(v).numpy().copy()) for v in variables]
        super()._keep()

    def _shared(self) -> list:
        """The variables that all ranks get from rank 0."""
        raise NotImplementedError

    def _private(self) -> list:
        """More variables, which are kept and restored but differ from rank to rank."""
        return []


class TensorFlowState(_VariableState):
    """TensorFlow or Keras variables, and plain values.

    Args:
        variables: the variables.
        session: must be None; TensorFlow 2 has no sessions.
        **kwargs: plain values, which become attributes of the state; see `State`.

    Raises:
        ValueError: if an argument breaks its rule.
    """

    def __init__(self, variables: Sequence | None = None, session: None = None, **kwargs: Any):
        if session is not None:
            raise ValueError(
                f"`session` must be None: TensorFlow 2 runs without sessions. Received: session={session!r}."
            )
        variables = list(variables or [])
        if not variables or not all(isinstance(v, (tf.Variable, keras.Variable)) for v in variables):
            raise ValueError(
                "`variables` must be a list of variables: TensorFlow 2 keeps no list of all there are. "
                f"Received: variables={variables!r}."
            )
        self.variables = variables
        super().__init__(**kwargs)

    def _shared(self):
        return self.variables


class TensorFlowKerasState(_VariableState):
    """A Keras model, its optimizer and plain values.

    Weights, statistics and all variables of the optimizer (slots, `iterations`, learning rate, loss scale)
    are kept, restored and synchronised. The states of random generators are kept and restored, so that steps
    done again draw the same dropout masks, but not synchronised: ranks draw different masks. Metrics are
    neither; `fit` resets them with every epoch.

    Args:
        model: a built Keras model.
        optimizer: its optimizer; None: the one it is compiled with. Others that are its attributes are part
            of the state either way, once they are built.
        backend: accepted for Horovod's sake.
        **kwargs: plain values such as `epoch=0, batch=0`, which become attributes of the state; see `State`.

    Raises:
        ValueError: if the model is not built, has no optimizer and none is given, or a name in `kwargs` is
            taken.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | None = None,
        backend: Any = None,
        **kwargs: Any,
    ):
        del backend
        if not is_built(model):
            raise ValueError(
                "`model` must be built: give it a keras.Input, or call `model.build(input_shape)`. "
                f"Received: model={model.name!r}, which has no variables yet."
            )
        others = optimizers_of(model)
        if optimizer is None:
            optimizer = getattr(model, "optimizer", None) or next(iter(others), None)
        if optimizer is None:
            raise ValueError(
                "`optimizer` must be given for a model that is not compiled. Received: optimizer=None."
            )
        self.model = model
        self.optimizer = optimizer
        self._others = [other for other in others if other is not optimizer]
        if not any(map(exchanges, self._others)):  # else each trains a part of the model
            build(optimizer, model.trainable_variables)
        super().__init__(**kwargs)

    def restore(self) -> None:
        """As in `State`, model and optimizer included; micro-batches added up since are dropped."""
        super().restore()
        settle(self.model)
        for hook in self._hooks():
            hook.drop_micro_batches()

    def sync(self) -> None:
        """As in `State`, model and optimizer included, and the vocabularies of its layers."""
        with recoverable():
            broadcast_vocabularies(current(), self.model, 0)
        super().sync()
        settle(self.model)

    def reset(self) -> None:
        """Makes the model's compiled steps anew, which hold the old number of ranks."""
        for hook in self._hooks():
            hook.restart()
        retrace(self.model)

    def _shared(self):
        return model_variables(self.model, [self.optimizer, *self._others])

    def _hooks(self):
        return [hook for optimizer in (self.optimizer, *self._others) for hook in hooks_of(optimizer)]

    def _private(self):
        return [v for v in self.model.variables if path_of(v).endswith("seed_generator_state")]


class KerasState(TensorFlowKerasState):
    """A Keras model, its optimizer and plain values; all is said at `TensorFlowKerasState`.

    Args:
        model: a built Keras model.
        optimizer: its optimizer; None: the one it is compiled with.
        **kwargs: plain values such as `epoch=0, batch=0`, which become attributes of the state.
    """

    def __init__(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer | None = None, **kwargs: Any
    ):
        super().__init__(model, optimizer, **kwargs)
