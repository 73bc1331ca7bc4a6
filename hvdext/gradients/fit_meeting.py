"""Where ranks that train one model meet in `fit`: when it begins, at each epoch, when it ends.

Equal gradients do not keep equal what callbacks do on one rank: stop, begin with another epoch, change a
learning rate, freeze a layer. All meet in one collective, so that ranks at different points notice it.
"""

from __future__ import annotations

from typing import Any

import keras

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.guards import guards_of
from hvdext.comm.watchdog import FIT_MEETING
from hvdext.data.drawn import rows_drawn
from hvdext.data.same_order import difference
from hvdext.gradients.apply_hook import ApplyHook
from hvdext.keras_tools.facts import frozen_layers, loss_facts
from hvdext.keras_tools.optimizers import learning_rate_of, updaters_of

_AS_ONE = (
    "callbacks that decide on a rank's own metrics, such as EarlyStopping, TerminateOnNaN and "
    "ReduceLROnPlateau, belong into hvd.callbacks.AsOneProcess([...]), on every rank"
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
        facts: dict[str, Any] = {"epochs": epochs}
        if not self._is_uneven:
            facts["steps per epoch (hvd.callbacks.UnevenBatches lets them differ)"] = steps
        self._meet("the beginning", facts, drawn=False)

    def at_epoch(self, epoch: int) -> None:
        """Before an epoch.

        Args:
            epoch: counted from 0.
        """
        self._meet(f"before epoch {epoch + 1}", {})

    def ends(self) -> None:
        """After the last epoch."""
        stopped = " (stop_training was set)" if self._model.stop_training else ""
        self._meet("the end" + stopped, {})

    @property
    def _is_uneven(self):
        return any(hook.expects_uneven_batches for hook in self._hooks)

    def _meet(self, point, facts, drawn=True):
        groups: dict[tuple[int, ...], Communicator] = {}
        for hook in self._hooks:
            comm = hook.exchange.comm()
            if comm.size > 1 and guards_of(comm).check_every:
                groups[comm.ranks] = comm
        if groups:
            facts = {**facts, **self._facts()}
            rows = rows_drawn(self._x) if drawn else []
        for comm in groups.values():
            _compare(comm, point, facts, rows)

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


def _compare(comm, point, facts, rows):
    mine = {key: repr(value) for key, value in facts.items()}
    everyone = comm.allgather_object((point, mine, rows), FIT_MEETING)
    points = [{f"point ({_AS_ONE})": point.partition(" (")[0]} for point, _, _ in everyone]
    if len(set(map(str, points))) > 1:
        points = [{f"point ({_AS_ONE})": point} for point, _, _ in everyone]
        raise ValueError(agreement.disagreement("where they are in model.fit", points, comm.ranks))
    views = [facts for _, facts, _ in everyone]
    if any(view != views[0] for view in views):
        raise ValueError(agreement.disagreement(f"model.fit, {point}", views, comm.ranks))
    problem = difference([rows for _, _, rows in everyone], comm.ranks, all_parts=True)
    if problem is not None:
        raise ValueError(problem)
