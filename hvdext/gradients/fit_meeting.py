"""Where ranks that train one model meet in `fit`: when it begins, at each epoch, when it ends.

Equal gradients do not keep equal what callbacks do on one rank: stop, begin with another epoch, change a
learning rate, freeze a layer. All meet in one collective, so that ranks at different points notice it.
"""

from __future__ import annotations

from typing import Any

import keras

from hvdext.collectives.vocabularies import vocabulary_facts
from hvdext.comm import agreement
from hvdext.comm.guards import guards_of
from hvdext.comm.mismatch import mismatch
from hvdext.comm.watchdog import FIT_MEETING
from hvdext.data.drawn import rows_drawn
from hvdext.data.same_order import difference, rows_of
from hvdext.gradients.apply_hook import ApplyHook
from hvdext.keras_tools.derived import derived_of
from hvdext.keras_tools.facts import frozen_layers, loss_facts
from hvdext.keras_tools.optimizers import learning_rate_of, updaters_of

_AS_ONE = (
    "callbacks that decide on a rank's own metrics, such as EarlyStopping, TerminateOnNaN and "
    "ReduceLROnPlateau, belong into hvd.callbacks.AsOneProcess([...]), on every rank"
)
_DERIVED = (
    "Preprocessing layers must have learnt the same on every rank: adapt them on all data, or put "
    "hvd.callbacks.BroadcastGlobalVariablesCallback(0) first"
)


class FitMeeting:
    """The meetings of one `fit`.

    Args:
        model: what is trained.
        hooks: of its optimizers that exchange gradients.
        x: what it is trained on.
    """

    def __init__(self, model: keras.Model, hooks: list[ApplyHook], x: Any):
        self._model = model
        self._hooks = hooks
        self._x = x

    def begins(self, epochs: int | None, steps: int | None) -> None:
        """Before the first epoch, after the callbacks that may have loaded something.

        Args:
            epochs: that `fit` is going to end with; None: unknown.
            steps: per epoch; None: unknown.

        Raises:
            ValueError: on every rank alike, as all methods, if the ranks differ.
        """

        def told():
            return self._plan(epochs, steps), rows_of(derived_of(self._model))

        self._meet("the beginning", told, _DERIVED)

    def at_epoch(self, epoch: int) -> None:
        """Before an epoch.

        Args:
            epoch: counted from 0.
        """
        self._meet(f"before epoch {epoch + 1}", lambda: ({}, rows_drawn(self._x)))

    def ends(self) -> None:
        """After the last epoch."""
        stopped = " (stop_training was set)" if self._model.stop_training else ""
        self._meet("the end" + stopped, lambda: ({}, rows_drawn(self._x)))

    @property
    def _is_uneven(self):
        return any(hook.expects_uneven_batches for hook in self._hooks)

    def _plan(self, epochs, steps):
        plan = {"epochs": epochs} | vocabulary_facts(self._model)
        plan |= {f"optimizer {i}": type(hook.optimizer).__name__ for i, hook in enumerate(self._hooks)}
        if not self._is_uneven:
            plan["steps per epoch (hvd.callbacks.UnevenBatches lets them differ)"] = steps
        return plan

    def _meet(self, point, told, rule=None):
        comms = {hook.exchange.comm().ranks: hook.exchange.comm() for hook in self._hooks}
        comms = {r: comm for r, comm in comms.items() if comm.size > 1 and guards_of(comm).check_every}
        if not comms:
            return
        facts, rows = told()
        for comm in comms.values():
            _compare(comm, point, facts | self._facts(), rows, rule)

    def _facts(self):
        facts = loss_facts(self._model) | {
            "layers that are frozen (trainable=False)": frozen_layers(self._model)
        }
        first = self._hooks[0].exchange.comm()
        if self._is_uneven or guards_of(first).on_divergence == "broadcast":
            return facts  # the learning rate follows the first rank's
        rates = [learning_rate_of(member) for hook in self._hooks for member in updaters_of(hook.optimizer)]
        values = [float(rate.numpy()) for rate in rates if isinstance(rate, keras.Variable)]
        return facts | {f"learning_rate ({_AS_ONE})": values}


def _compare(comm, point, facts, rows, rule):
    mine = {key: repr(value) for key, value in facts.items()}
    everyone = comm.allgather_object((point, mine, rows), FIT_MEETING)
    points = [{f"point ({_AS_ONE})": point.partition(" (")[0]} for point, _, _ in everyone]
    if len(set(map(str, points))) > 1:
        points = [{f"point ({_AS_ONE})": point} for point, _, _ in everyone]
        raise mismatch(agreement.disagreement("where they are in model.fit", points, comm.ranks))
    views = [facts for _, facts, _ in everyone]
    if any(view != views[0] for view in views):
        raise mismatch(agreement.disagreement(f"model.fit, {point}", views, comm.ranks))
    problem = difference([rows for _, _, rows in everyone], comm.ranks, rule)
    if problem is not None:
        raise ValueError(problem)
