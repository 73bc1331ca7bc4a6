"""Callbacks that keep files of their own beside the model's: one rank leads, the others follow.

Keras' `BackupAndRestore` writes, copies and deletes a folder. Ranks that all did so would get in each
other's way. Here one rank runs the callback, and tells the others when it saves or loads the model, which all
do together, and when it has ended, or failed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import raise_on_all
from hvdext.keras_tools.epochs import begin_with_epoch, initial_epoch_of

_CALLED_BY_ALL = ("save", "save_weights", "load_weights", "load_checkpoint")
_HOOKS = [name for name in dir(keras.callbacks.Callback) if name.startswith("on_")]
_Backup = keras.callbacks.BackupAndRestore


def with_leader(callbacks: Any, model: keras.Model, comm: Communicator) -> Any:
    """The callbacks of `fit`, `BackupAndRestore` among them so that one rank alone keeps its folder.

    Args:
        callbacks: as `fit` takes them; every rank of `comm` passes the same.
        model: whose methods for files all ranks call together.
        comm: the ranks that fit together; the first one leads.

    Raises:
        ValueError: on every rank alike, if the ranks' `save_freq` differ.
    """
    if comm.size == 1 or callbacks is None:
        return callbacks
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks = [_with_leader(one, comm) for one in callbacks.callbacks]
        callbacks.set_model(model)
        return callbacks
    return [_with_leader(one, comm) for one in keras.tree.flatten(callbacks)]


def _with_leader(callback, comm):
    if not isinstance(callback, _Backup):
        return callback
    agreement.check(comm, type(callback).__name__, {"save_freq": callback.save_freq})
    return LeaderBackup(callback, comm)


class LeaderBackup(keras.callbacks.Callback):
    """`callback`, run by the first rank of `comm` for all."""

    def __init__(self, callback: keras.callbacks.Callback, comm: Communicator):
        super().__init__()
        self._callback = callback
        self._comm = comm

    def set_params(self, params):
        """As in Keras."""
        super().set_params(params)
        self._callback.set_params(params)

    def set_model(self, model):
        """As in Keras; the leader's callback sees a model that announces what all call."""
        super().set_model(model)
        self._callback.set_model(_AnnouncedModel(model, self._tell) if self._comm.rank == 0 else model)

    def run(self, hook: str, *args, **kwargs) -> None:
        """Called by all ranks for each of Keras' calls, `hook` being its name."""
        if not self._is_used(hook):
            return
        error = None
        if self._comm.rank == 0:
            try:
                getattr(self._callback, hook)(*args, **kwargs)
            except Exception as problem:  # the others wait, and must hear of it
                error = problem
            self._tell(None)
        else:
            self._follow()
        raise_on_all(
            self._comm,
            error,
            f"{type(self._callback).__name__}.{hook} has failed",
            "hvdext.placement.problem",
        )

    def _is_used(self, hook):
        mine = getattr(type(self._callback), hook)
        if mine is _Backup.on_train_batch_end and self._callback.save_freq == "epoch":
            return False  # it does nothing then, and a message per batch would cost time
        return mine is not getattr(keras.callbacks.Callback, hook)

    def _tell(self, call: tuple[str, tuple, dict] | None) -> None:
        """Announces a call of the model, or, by None, the end of the hook, and what it has set."""
        state = initial_epoch_of(self.model), self.model.stop_training
        self._comm.broadcast_object((call, state), 0, "hvdext.placement.led")

    def _follow(self) -> None:
        while True:
            call, state = self._comm.broadcast_object(None, 0, "hvdext.placement.led")
            if call is None:
                break
            method, args, kwargs = call
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                # It fails on all ranks alike: what follows is for the leader to say.
                getattr(self.model, method)(*args, **kwargs)
        epoch, self.model.stop_training = state
        begin_with_epoch(self.model, epoch)


def _hook(name):
    def hook(self, *args, **kwargs):
        self.run(name, *args, **kwargs)

    return hook


for _name in _HOOKS:
    setattr(LeaderBackup, _name, _hook(_name))


class _AnnouncedModel:
    """The model as the leader's callback sees it: what all ranks call together is announced first."""

    def __init__(self, model: keras.Model, tell):
        vars(self).update(announced=model, tell=tell)  # what else is set is set on the model

    def __getattr__(self, name):
        attribute = getattr(self.announced, name)
        if name not in _CALLED_BY_ALL:
            return attribute

        def announced(*args, **kwargs):
            self.tell((name, args, kwargs))
            return attribute(*args, **kwargs)

        return announced

    def __setattr__(self, name, value):
        setattr(self.announced, name, value)
