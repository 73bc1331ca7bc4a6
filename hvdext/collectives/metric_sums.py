"""Metrics of all ranks together: Keras' metrics keep sums, and sums add up over the ranks.

A mean is a total and a count, an AUC four lists of counts, a recall true positives and false negatives. Added
up over the ranks they are what one process over all samples would hold, and the metric's own `result` makes
the value of it. What is not known to be a sum is combined by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.keras_tools.metrics import compiled_metrics, loss_tracker

REDUCTIONS = ("mean", "sum", "min", "max", "states")


class Share:
    """One rank's part of a phase (an epoch's training, or a validation): its values, and states behind them.

    Args:
        model: whose metrics have seen the phase; None: nothing to show.
        reductions: by name of the log, what the user has chosen.
    """

    def __init__(self, model: keras.Model | None, reductions: Mapping[str, str]):
        self._reductions = reductions
        self.logs: dict[str, Any] = {}
        self.samples = 0.0
        self.metrics: dict[str, keras.metrics.Metric] = {}
        self.states: dict[str, list[np.ndarray]] = {}
        self._results: dict[str, Any] = {}
        if model is None:
            return
        # Keras weighs the mean of the loss by the batch sizes, so its weight is the number of samples.
        tracker = loss_tracker(model)
        self.samples = 0.0 if tracker is None else float(tracker.count)
        for name, (metric, result) in metrics_by_name(model).items():
            chosen = reductions.get(name)
            if chosen == "states" or (chosen is None and type(metric).__module__.startswith("keras.")):
                self.metrics[name] = metric
                self._results[name] = result
                self.states[name] = [np.asarray(v.numpy(), np.float64) for v in metric.variables]

    def take_logs(self, logs: Mapping[str, Any]) -> Share:
        """Says what this rank has logged of the phase; what is no number stays out."""
        self.logs = {name: value for name, value in logs.items() if _is_numeric(value)}
        for name in self.logs.keys() & self.metrics.keys():
            # A training step of the user's own may log something else under a metric's name.
            if self._reductions.get(name) is None and not _close(self.logs[name], self._results[name]):
                del self.metrics[name], self.states[name]
        # Keras finds out that there is no batch by running a step without one, which still counts its size.
        for name in self.states.keys() - self.logs.keys():
            self.states[name] = [np.zeros_like(state) for state in self.states[name]]
        self.samples = self.samples if self.logs else 0.0
        return self

    def facts(self) -> dict[str, Any]:
        """What the other ranks must know."""
        layout = {
            name: (type(metric).__name__, tuple(np.shape(state) for state in self.states[name]))
            for name, metric in self.metrics.items()
        }
        values = {name: np.asarray(value, np.float64) for name, value in self.logs.items()}
        chosen = {name: self._reductions[name] for name in sorted(self._reductions)}
        return {"samples": self.samples, "values": values, "layout": layout, "reductions": chosen}


def combine(comm: Communicator, everyone: Sequence[Mapping[str, Any]], share: Share) -> dict[str, Any]:
    """The logs that one process over all ranks' samples would have; every rank of `comm` must call it.

    Args:
        comm: who exchanges the states.
        everyone: each rank's facts, in rank order.
        share: this rank's own part.

    Returns:
        One value per name that any rank has logged: a float, or an array where the metric has several.

    Raises:
        ValueError: on every rank alike: if `reductions` differ, metrics of one name differ, or "states" is
            wanted for something that is no metric.
    """
    names = list(dict.fromkeys(name for facts in everyone for name in facts["values"]))
    summed = _summed(everyone, names)
    values = {name: _combined_values(everyone, name) for name in names if name not in summed}
    if not summed:
        return values
    sizes = {name: sum(int(np.prod(s)) for s in shapes) for name, (_, shapes) in summed.items()}
    flat = [np.ravel(s) for n in summed for s in share.states.get(n, [np.zeros(sizes[n])])]
    (total,) = comm.allreduce([tf.constant(np.concatenate([*flat, np.zeros(1)]))], "hvdext.metrics.states")
    parts = np.split(total.numpy()[:-1], np.cumsum(list(sizes.values()))[:-1])
    results = {
        name: _result(share.metrics[name], name, part)
        for name, part in zip(summed, parts, strict=True)
        if name in share.metrics
    }
    # A rank that has never had a batch may lack the metrics that the sums belong to.
    if any(name not in facts["layout"] for facts in everyone for name in summed):
        known = comm.allgather_object(results, "hvdext.metrics.results")
        results = {name: next(r[name] for r in known if name in r) for name in summed}
    return {name: results[name] if name in summed else values[name] for name in names}


def metrics_by_name(model: keras.Model) -> dict[str, tuple[keras.metrics.Metric, Any]]:
    """Each metric of `model` and its present result, by the name under which Keras logs it."""
    found: dict[str, tuple[keras.metrics.Metric, Any]] = {}
    compiled = compiled_metrics(model)
    for metric in getattr(model, "metrics", []):
        if metric is compiled:
            results = compiled.result() if compiled.built else {}
            # Keras names them in the order of its list, unless one name has hidden another.
            if len(results) == len(compiled.metrics):
                pairs = zip(compiled.metrics, results.values(), strict=True)
                found.update(zip(results, pairs, strict=True))
            continue
        result = metric.result()
        results = result if isinstance(result, dict) else {metric.name: result}
        found.update({name: (metric, value) for name, value in results.items()})
    return found


def weighted_mean(pairs: Sequence[tuple[Any, float]]) -> Any:
    """The mean of (value, weight) pairs; all count alike if no weight is above 0."""
    values = [value for value, weight in pairs if weight] or [value for value, _ in pairs]
    weights = [weight for _, weight in pairs if weight] or [1.0] * len(pairs)
    if all(np.array_equal(value, values[0], equal_nan=True) for value in values):
        return values[0]  # not the nearest number to it
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _summed(everyone, names):
    """The names whose states add up, with their layout: (class, shapes of the states)."""
    chosen = everyone[0]["reductions"]
    if any(facts["reductions"] != chosen for facts in everyone):
        views = [facts["reductions"] for facts in everyone]
        raise ValueError(f"`reductions` must be the same on all ranks. Received, by rank: {views}.")
    summed = {}
    for name in names:
        layouts = {facts["layout"][name] for facts in everyone if name in facts["layout"]}
        if len(layouts) > 1:
            raise ValueError(
                f"The metric {name!r} must be the same on all ranks. Received: {sorted(map(str, layouts))}."
            )
        by_value = any(name in facts["values"] and name not in facts["layout"] for facts in everyone)
        if layouts and not by_value:
            summed[name] = layouts.pop()
        elif chosen.get(name) == "states":
            raise ValueError(
                "`reductions` may be 'states' for metrics of the model only. "
                f"Received: {name!r}, which is none."
            )
    return summed


def _combined_values(everyone, name):
    pairs = [(facts["values"][name], facts["samples"]) for facts in everyone if name in facts["values"]]
    values = [value for value, _ in pairs]
    match everyone[0]["reductions"].get(name):
        case "sum":
            value = sum(values)
        case "min":
            value = np.minimum.reduce(values)
        case "max":
            value = np.maximum.reduce(values)
        case _:
            value = weighted_mean(pairs)
    return _plain(value)


def _result(metric, name, flat):
    """What `metric` makes of states that are not its own."""
    shapes = [tuple(v.shape) for v in metric.variables]
    parts = np.split(flat, np.cumsum([int(np.prod(s)) for s in shapes])[:-1])
    states = [
        tf.cast(tf.constant(part.reshape(shape)), variable.dtype)
        for part, shape, variable in zip(parts, shapes, metric.variables, strict=True)
    ]
    result = metric.stateless_result(states)
    return _plain(result[name] if isinstance(result, dict) else result)


def _plain(value):
    array = keras.ops.convert_to_numpy(value)
    return float(array) if np.ndim(array) == 0 else np.asarray(array, keras.config.floatx())


def _is_numeric(value):
    try:
        np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return False
    return True


def _close(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=0, equal_nan=True)
