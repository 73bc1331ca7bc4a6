"""Metrics of the whole job instead of one rank's share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from hvdext.callbacks.meeting import check_points, gather
from hvdext.collectives.metric_sums import Share, checked_reductions, combine
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.log import warn
from hvdext.keras_tools.metrics import change_next_results, take_back
from hvdext.keras_tools.numbering import renumbered
from hvdext.keras_tools.sample_counter import SampleCounter

_VALIDATION = "the end of validation"
_EPOCH = "the end of epoch "


class MetricAverageCallback(keras.callbacks.Callback):
    """Makes the logs of `fit` and `evaluate` those of one process over all ranks' samples.

    The states of metrics (means, AUC, precision, recall, F1, confusion matrices, R2, ...) are added up over
    the ranks, and the metric makes its value of the sums: exact also where ranks have different numbers of
    samples, or none. So it is with classes of your own that inherit `result` from one of Keras', or whose
    `update_state` plainly adds (`self.total.assign_add(...)`, `self.total.assign(self.total + ...)`, inner
    metrics), and with what `get_metrics_result` makes of such metrics. Other metrics may hold anything: their
    values are averaged, weighted by the samples each rank has seen, and a warning names them once. So are
    other values in the logs ("lr"), over the ranks that have them. The metrics themselves keep their own
    rank's states.

    Put it before the callbacks that read the logs (checkpoints, early stopping, TensorBoard): they then see
    the same values on every rank, as does the history that `fit` returns. `evaluate` returns them when this
    callback is passed to it on every rank. Logs of single batches stay each rank's own.

    Validation on some of the ranks only works as well; the others get its values with the epoch's logs.

    Args:
        device: accepted for Horovod's sake; the few numbers travel through the host's memory.
        reductions: how to combine what, by its name in the logs: "mean" (weighted by samples), "sum", "min",
            "max" of the ranks' values, or "states" to add up the states of a metric. A name without `val_`
            holds for training and validation, one with it for validation alone.

    Raises:
        ValueError: if `reductions` breaks its rule; at the end of an epoch, on every rank alike: if ranks
            have different metrics under one name or are at different epochs.
        RuntimeError: when training begins, if `hvd.init()` has not been called.
    """

    @suggests_keywords
    def __init__(self, device: str = "", *, reductions: Mapping[str, str] | None = None):
        super().__init__()
        self._reductions = checked_reductions(reductions)
        self._seen: set[str] = set()
        self._training: Share | None = None  # kept over the validation, for which Keras clears the metrics
        self._validation: dict[str, Any] = {}
        self._latest: dict[str, Any] = {}
        self._is_in_epoch = False
        self._counters: dict[str, SampleCounter] = {}  # of steps that Keras' own mean does not follow
        self._begun: dict[str, int] = {}
        del device

    def set_model(self, model):
        super().set_model(model)
        self._stop_counting()
        for kind in ("train", "test"):
            if isinstance(model, keras.Model) and SampleCounter.is_needed(model, kind):
                self._counters[kind] = SampleCounter.of(model, kind)
                self._counters[kind].acquire()

    def on_train_begin(self, logs=None):
        current()  # complains now rather than after the first epoch
        self._is_in_epoch = False
        self._latest, self._seen = {}, set()

    def on_epoch_begin(self, epoch, logs=None):
        self._training, self._validation, self._is_in_epoch = None, {}, True
        self._begin_to_count("train")

    def on_test_begin(self, logs=None):
        self._keep_training()
        self._take_over()

    def on_test_end(self, logs=None):
        # Still waiting: called by a loop of the user's own instead of Keras' `evaluate`.
        if self.model is None or take_back(self.model, self._validate):
            averaged = self._validate(logs or {})
            if logs is not None:
                logs.update(averaged)
        if not self._is_in_epoch:
            self._stop_counting()

    def on_epoch_end(self, epoch, logs=None):
        done = {f"val_{name}": value for name, value in self._validation.items()}
        mine = {name: value for name, value in (logs or {}).items() if name not in done}
        share = self._training or self._share("train", self._reductions)
        self._training, self._is_in_epoch = None, False
        averaged = self._combine(f"{_EPOCH}{epoch + 1}", share.take_logs(mine))
        averaged |= {f"val_{name}": value for name, value in self._validation.items()}
        self._latest = averaged
        self._seen.update(averaged)
        if logs is not None:
            logs.update(averaged)

    def on_train_end(self, logs=None):
        if logs is not None:
            logs.update(self._latest)
        unknown = [n for n in self._reductions if n not in self._seen and f"val_{n}" not in self._seen]
        if unknown and current().rank == 0:
            warn(f"`reductions` names {unknown}, but only {sorted(self._seen)} have been logged.")
        self._stop_counting()

    # -- validation ------------------------------------------------------------------------------------

    def _keep_training(self):
        if self._is_in_epoch and self._training is None:
            self._training = self._share("train", self._reductions)

    def _share(self, kind, reductions):
        counter = self._counters.get(kind)
        samples = 0 if counter is None else counter.total() - self._begun.get(kind, 0)
        return Share(self.model, reductions, samples)

    def _begin_to_count(self, kind):
        if kind in self._counters:
            self._begun[kind] = self._counters[kind].total()

    def _stop_counting(self):
        while self._counters:
            self._counters.popitem()[1].release()

    def _take_over(self):
        self._begin_to_count("test")
        if self.model is not None:
            change_next_results(self.model, self._validate)

    def _validate(self, logs):
        chosen = {n: r for n, r in self._reductions.items() if not n.startswith("val_")}
        chosen |= {n.removeprefix("val_"): r for n, r in self._reductions.items() if n.startswith("val_")}
        self._validation = self._combine(_VALIDATION, self._share("test", chosen).take_logs(logs))
        return self._validation

    # -- the exchange ----------------------------------------------------------------------------------

    def _combine(self, point, share):
        """The logs of all ranks at this point; a rank without validation first waits for those that have."""
        comm = current()
        while True:
            everyone = gather(comm, point, share.facts())
            points = [found for found, _ in everyone]
            _refuse_other_numbers(comm, [facts for _, facts in everyone])
            validates = [found == _VALIDATION for found in points]
            if not any(validates):
                check_points(comm, points)
                return combine(comm, [facts for _, facts in everyone], share)
            elsewhere = {found for found in points if found != _VALIDATION}
            if len(elsewhere) > 1 or not all(found.startswith(_EPOCH) for found in elsewhere):
                check_points(comm, points)
            here = [facts for found, facts in everyone if found == _VALIDATION]
            silent = Share(None, here[0]["reductions"])
            known = [facts if found == _VALIDATION else silent.facts() for found, facts in everyone]
            if point == _VALIDATION:
                return combine(comm, known, share)
            self._validation = combine(comm, known, silent)


def _refuse_other_numbers(comm, everyone):
    """Ranks that log nothing have no names; others that differ in Keras' numbers only mean the same."""
    told = zip(comm.ranks, everyone, strict=True)
    logged = {rank: list(facts["values"]) for rank, facts in told if facts.get("values")}
    without = {tuple(renumbered(sorted(names))) for names in logged.values()}
    if len(without) == 1 and len({tuple(sorted(names)) for names in logged.values()}) > 1:
        shown = "; ".join(f"rank {rank}: {sorted(names)}" for rank, names in logged.items())
        raise ValueError(
            "Metrics must have the same names on every rank. Keras has numbered them, since some ranks have "
            f"made more of them: give each a name, such as keras.metrics.AUC(name='auc'). Received: {shown}."
        )
