"""Any Keras callbacks, on all ranks as if there were one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.callbacks.best_model import BestModelCheckpoint
from hvdext.callbacks.meeting import meet, raise_of_rank_0
from hvdext.callbacks.metrics import MetricAverageCallback
from hvdext.collectives.variables import broadcast_variables
from hvdext.comm import agreement
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import current, use
from hvdext.comm.failures import told
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.derived import settle
from hvdext.keras_tools.epochs import begin_with_epoch, initial_epoch_of
from hvdext.keras_tools.models import model_variables
from hvdext.keras_tools.optimizers import build, innermost, learning_rate_of

_TEST_HOOKS = ("on_test_begin", "on_test_end", "on_test_batch_begin", "on_test_batch_end")
# Keras' own batch hooks call the older names.
_OLD_NAMES = {"on_train_batch_begin": "on_batch_begin", "on_train_batch_end": "on_batch_end"}
_BATCH_HOOKS = tuple(
    f"on_{phase}_batch_{side}" for phase in ("train", "test", "predict") for side in ("begin", "end")
)


class AsOneProcess(MetricAverageCallback):
    """Runs callbacks on rank 0 only, and makes what they decide and change hold on every rank.

        fit(..., callbacks=[hvd.callbacks.AsOneProcess([EarlyStopping(), ModelCheckpoint("best.keras")])])

    The wrapped callbacks see the logs of all ranks together (this is a `MetricAverageCallback` as well), and
    only rank 0 writes files. After each of their epoch hooks, all ranks take over what they have done there:
    `stop_training`, the epoch to begin with, keys added to the logs, and variables of the model and the
    optimizer that differ from before: the learning rate, weights from a backup, the best epoch's weights.
    When weights have changed, rank 0's whole model and optimizer become everybody's, local variables and
    batch statistics included; states of random generators stay each rank's own.

    Hooks of single batches run on rank 0 without an exchange and see rank 0's logs. What they decide there
    (`TerminateOnNaN`) is held back until the epoch's end, when all ranks stop together. A learning rate that
    is set there would drive the ranks apart: it is put back and becomes an error. Weights must not be
    changed there. `predict` is for each rank alone: on rank 0 the callbacks run, and nothing is exchanged.

    A callback that fails, in whatever hook, ends the training on every rank with an error that names it;
    rank 0 raises the callback's own. Within wrapped callbacks `hvd.size()` is 1. Attributes such as
    `EarlyStopping.stopped_epoch` are set on rank 0.

    Put it after `BroadcastGlobalVariablesCallback` or before it: a backup that is restored reaches all ranks
    either way. A `MetricAverageCallback` besides is not needed and does no harm.

    Args:
        callbacks: Keras callbacks, or one; every rank makes the same ones. Those of hvdext that talk to other
            ranks stand beside this one instead.
        reductions: as in `MetricAverageCallback`.

    Raises:
        ValueError: if an argument breaks its rule; when training begins, on every rank alike, if ranks have
            different callbacks.
        RuntimeError: on every rank but 0, or an error of a more fitting class (`OSError`, `ValueError`), if a
            callback fails.
    """

    runs_on_one_rank = True  # a pipeline, which all ranks save together, refuses it

    @suggests_keywords
    def __init__(
        self,
        callbacks: keras.callbacks.Callback | Sequence[keras.callbacks.Callback],
        *,
        reductions: Mapping[str, str] | None = None,
    ):
        super().__init__(reductions=reductions)
        self._callbacks = _checked(callbacks)
        self._is_prepared = False
        self._failure: tuple[str, Exception] | None = None  # what rank 0 has not told the others yet
        self._stops = False
        self._in_fit = False
        self._tests = any(self._has(hook) for hook in _TEST_HOOKS)
        # Only where needed: Keras waits for each batch's logs as soon as anybody wants them.
        for hook in filter(self._has, _BATCH_HOOKS):
            setattr(self, hook, self._batch_hook(hook))

    def set_model(self, model):
        super().set_model(model)
        self._is_prepared = False

    # -- hooks with an exchange ------------------------------------------------------------------------

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._failure, self._stops, self._in_fit = None, False, True
        self._agree()
        self._run_and_share("on_train_begin", logs)

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if self._has("on_epoch_begin"):
            self._run_and_share("on_epoch_begin", epoch, logs)

    def on_test_begin(self, logs=None):
        self._keep_training()
        if not self._in_fit:
            self._failure = None
            self._agree()
        if self._tests:
            self._run_and_share("on_test_begin", logs)
        self._take_over()

    def on_test_end(self, logs=None):
        super().on_test_end(logs)
        if self._tests:
            self._run_and_share("on_test_end", logs)

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self._run_and_share("on_epoch_end", epoch, logs)

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self._in_fit = False
        self._run_and_share("on_train_end", logs)

    # -- hooks without ---------------------------------------------------------------------------------

    def on_predict_begin(self, logs=None):
        self._run("on_predict_begin", logs)
        self._raise_own()

    def on_predict_end(self, logs=None):
        self._run("on_predict_end", logs)
        self._raise_own()

    def _batch_hook(self, hook):
        def call(batch, logs=None):
            if current().size == 1 or "predict" in hook:
                self._run(hook, batch, logs)
                self._raise_own()
            elif current().rank == 0:
                self._run_and_hold(hook, batch, logs)

        return call

    def _run_and_hold(self, hook, batch, logs):
        model = self.model
        stopped, rate = model.stop_training, _rate(model.optimizer)
        self._run(hook, batch, logs)
        self._stops |= model.stop_training and not stopped
        model.stop_training = stopped
        if _rate(model.optimizer) != rate:
            model.optimizer.learning_rate = rate
            self._fail(
                f"a callback's {hook}",
                ValueError(
                    "`callbacks` must not change the learning rate within an epoch, which rank 0 alone would "
                    f"follow: pass such a callback beside AsOneProcess. Received: a change in {hook}."
                ),
            )

    # -- on rank 0 -------------------------------------------------------------------------------------

    def _has(self, hook):
        return any(_overrides(callback, hook) for callback in self._callbacks)

    def _run(self, hook, *args):
        """Calls `hook` of every callback, on rank 0; what goes wrong is kept for everybody."""
        if current().rank != 0 or self._failure is not None:
            return
        calls = [(callback, hook, args) for callback in self._callbacks]
        if not self._is_prepared:  # only now, since some open files there
            self._is_prepared = True
            for name, argument in (("set_params", self.params), ("set_model", self.model)):
                calls = [*((callback, name, (argument,)) for callback in self._callbacks), *calls]
        with use(SoloComm()):
            for callback, name, arguments in calls:
                try:
                    getattr(callback, name)(*arguments)
                except Exception as error:
                    self._fail(f"{type(callback).__name__}.{name}", error)
                    return

    def _fail(self, where, error):
        if self._failure is None:
            self._failure = (where, error)

    def _raise_own(self):
        if self._failure is not None:
            (_, error), self._failure = self._failure, None
            raise error

    # -- everybody -------------------------------------------------------------------------------------

    def _agree(self):
        names = [type(callback).__name__ for callback in self._callbacks]
        agreement.check(current(), "hvd.callbacks.AsOneProcess", {"callbacks": names, "tests": self._tests})

    def _run_and_share(self, hook, *args):
        comm, model, logs = current(), self.model, args[-1]
        if comm.size == 1:
            self._run(hook, *args)
            self._raise_own()
            return
        before = self._before(comm, hook, logs)
        self._run(hook, *args)
        everyone = meet(comm, f"AsOneProcess.{hook}", self._outcome(comm, before, logs))
        model.stop_training = any(outcome["stops"] for outcome in everyone)
        first = everyone[0]
        self._raise_failure(comm, first["failure"])
        if logs is not None:
            logs.update(first["logs"])
        if hook == "on_train_begin":
            begin_with_epoch(model, first["initial epoch"])
        if first["built"]:
            build(model.optimizer, model.trainable_variables)
        variables = model_variables(model)
        if first["changed"] == "all":
            broadcast_variables(variables, comm.ranks[0])
            settle(model)
        elif first["changed"]:
            broadcast_variables([variables[i] for i in first["changed"]], comm.ranks[0])

    def _before(self, comm, hook, logs):
        if comm.rank != 0:
            return None
        watched = self._has(hook) or not self._is_prepared
        return dict(logs or {}), _fingerprints(self.model) if watched else None

    def _outcome(self, comm, before, logs) -> dict[str, Any]:
        model = self.model
        optimizer = getattr(model, "optimizer", None)
        outcome = {"stops": bool(model.stop_training or self._stops)}
        self._stops = False
        if comm.rank != 0:
            return outcome
        logs_before, fingerprints = before
        failure = self._failure and (self._failure[0], told(self._failure[1]))
        added = {
            key: value
            for key, value in (logs or {}).items()
            if key not in logs_before or value is not logs_before[key]
        }
        return outcome | {
            "failure": failure,
            "logs": {key: np.asarray(v) if tf.is_tensor(v) else v for key, v in added.items()},
            "initial epoch": initial_epoch_of(model),
            "built": optimizer is not None and optimizer.built and bool(model.trainable_variables),
            "changed": _changed(model, fingerprints) if failure is None else [],
        }

    def _raise_failure(self, comm, failure):
        if failure is not None:
            where, words = failure
            own, self._failure = self._failure and self._failure[1], None
            raise_of_rank_0(comm, words, f"The callback {where} has failed", own)


def _checked(callbacks):
    found = list(tf.nest.flatten(callbacks)) if callbacks is not None else []
    for callback in found:
        if not isinstance(callback, keras.callbacks.Callback):
            raise ValueError(
                "`callbacks` must be a Keras callback or a list of them. "
                f"Received: {callback!r} of type {type(callback).__name__}."
            )
        ours = type(callback).__module__.startswith("hvdext.")
        if ours and not isinstance(callback, BestModelCheckpoint):
            raise ValueError(
                f"`callbacks` must not hold hvd.callbacks.{type(callback).__name__}, which every rank has to "
                "run: pass it to `fit` beside AsOneProcess. Received: it among the callbacks."
            )
    return found


def _overrides(callback, hook):
    """Whether `callback` has a `hook` of its own, as a method or set on the object (LambdaCallback)."""
    names = [hook, *([_OLD_NAMES[hook]] if hook in _OLD_NAMES else [])]
    plain = keras.callbacks.Callback
    return any(getattr(getattr(callback, n), "__func__", None) is not getattr(plain, n) for n in names)


def _rate(optimizer):
    rate = None if optimizer is None else learning_rate_of(innermost(optimizer))
    return float(rate.numpy()) if isinstance(rate, keras.Variable) else None


def _fingerprints(model):
    """64 bits of each variable of the model and its optimizer, by the variable's identity."""
    return {
        id(v): tf.fingerprint(tf.reshape(v, [1, tf.size(v)])).numpy().tobytes()
        for v in model_variables(model)
    }


def _changed(model, before):
    """Which of `model_variables` differ from before: their places, or "all" if weights do."""
    if before is None:
        return []
    after, variables = _fingerprints(model), model_variables(model)
    places = [i for i, v in enumerate(variables) if after[id(v)] != before.get(id(v))]
    weights = {id(v) for v in model.variables}
    return "all" if any(id(variables[i]) in weights for i in places) else places
