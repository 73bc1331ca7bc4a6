"""Metrics of all ranks together: Keras' metrics keep sums, and sums add up over the ranks.

A mean is a total and a count, an AUC four lists of counts, a recall true positives and false negatives. Added
up over the ranks they are what one process over all samples would hold, and the metric's own `result` makes
the value of it. What is not known to be a sum is combined by value, which is told once where values differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.common.log import warn
from hvdext.keras_tools.additive import states_add_up
from hvdext.keras_tools.metrics import compiled_metrics, has_own_results, loss_tracker, results_with

REDUCTIONS = ("mean", "sum", "min", "max", "states")
_TOLD = "what is averaged by value"  # in the ledger's notes


class Share:
    """One rank's part of a phase (an epoch's training, or a validation): its values, and states behind them.

    Args:
        model: whose metrics have seen the phase; None: nothing to show.
        reductions: by name of the log, what the user has chosen.
        samples: how many the phase had, where the model's own step does not tell its loss.
    """

    def __init__(self, model: keras.Model | None, reductions: Mapping[str, str], samples: float = 0.0):
        self._reductions = reductions
        self._model = model
        self.logs: dict[str, Any] = {}
        self.samples = 0.0
        self.metrics: dict[str, keras.metrics.Metric] = {}
        self.states: dict[str, list[np.ndarray]] = {}
        self._derived: dict[str, Any] = {}  # what the model makes of several metrics
        self._same: dict[str, list[str]] = {}  # metrics by another name in the logs
        self._results: dict[str, Any] = {}
        self._unknown: dict[str, str] = {}  # classes of the metrics that may not add up
        if model is None:
            return
        # Keras weighs the mean of the loss by the batch sizes, so its weight is the number of samples.
        tracker = loss_tracker(model)
        self.samples = (0.0 if tracker is None else float(tracker.count)) or samples
        found = metrics_by_name(model)
        for name, (metric, result) in found.items():
            chosen = reductions.get(name)
            if chosen == "states" or (chosen is None and states_add_up(metric)):
                self.metrics[name] = metric
                self._results[name] = result
                self.states[name] = [np.asarray(v.numpy(), np.float64) for v in metric.variables]
            else:
                self._unknown[name] = type(metric).__name__
        compiled = compiled_metrics(model)
        is_readable = compiled is None or compiled.built
        if has_own_results(model) and is_readable and not self._unknown:
            results = model.get_metrics_result()
            self._derived = {
                name: value
                for name, value in results.items()
                if name not in reductions and not (name in found and _close(value, found[name][1]))
            }

    def take_logs(self, logs: Mapping[str, Any]) -> Share:
        """Says what this rank has logged of the phase; what is no number stays out."""
        self.logs = {name: value for name, value in logs.items() if _is_numeric(value)}
        # A step of the user's own may log something else under a metric's name.
        others = {
            name
            for name in self.logs.keys() & self.metrics.keys()
            if self._reductions.get(name) is None and not _close(self.logs[name], self._results[name])
        }
        self._derived = {
            name: value
            for name, value in self._derived.items()
            if name in self.logs and _close(self.logs[name], value)
        }
        used = {name for name, state in self.states.items() if any(np.any(part) for part in state)}
        for name in self.logs.keys() - self._reductions.keys() - self._derived.keys():
            if name in others or name not in self.metrics.keys() | self._unknown.keys():
                # Or what it logs is a metric under another name.
                self._same[name] = sorted(
                    one for one in used - others if _close(self.logs[name], self._results[one])
                )
        behind = {one for metrics in self._same.values() for one in metrics}
        for name in others - self._derived.keys():
            del self.metrics[name], self.states[name]
        # Keras finds out that there is no batch by running a step without one, which still counts its size.
        if not self._derived:
            for name in self.states.keys() - self.logs.keys() - behind:
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
        return {
            "samples": self.samples,
            "values": values,
            "layout": layout,
            "reductions": chosen,
            "derived": sorted(self._derived),
            "same": self._same,
            "unknown": self._unknown,
        }

    def results_with(self, total: Mapping[str, Sequence[np.ndarray]]) -> dict[str, Any]:
        """What the model itself makes of the states of all ranks."""
        assert self._model is not None
        states = {
            id(variable): tf.cast(tf.constant(state), variable.dtype)
            for name, parts in total.items()
            for variable, state in zip(self.metrics[name].variables, parts, strict=True)
        }
        return {name: _plain(value) for name, value in results_with(self._model, states).items()}


def combine(
    comm: Communicator, everyone: Sequence[Mapping[str, Any]], share: Share, last: int | None = None
) -> dict[str, Any]:
    """The logs that one process over all ranks' samples would have; every rank of `comm` must call it.

    Args:
        comm: who exchanges the states.
        everyone: each rank's facts, in rank order.
        share: this rank's own part.
        last: the rank that had the last batch of all: of what a step logs that is no metric, Keras returns
            what its last batch gave. None: there is no such batch, and the values are averaged.

    Returns:
        One value per name that any rank has logged: a float, or an array where the metric has several.

    Raises:
        ValueError: on every rank alike: if `reductions` differ, metrics of one name differ, or "states" is
            wanted for something that is no metric.
    """
    names = list(dict.fromkeys(name for facts in everyone for name in facts["values"]))
    derived = [
        name
        for name in names
        if all(name in facts["derived"] for facts in everyone if name in facts["values"])
    ]
    same = {name: found for name in names if (found := _same_metric(everyone, name)) is not None}
    needed = list(dict.fromkeys([*(n for n in names if n not in derived and n not in same), *same.values()]))
    if derived:
        needed = list(dict.fromkeys([*needed, *(n for facts in everyone for n in facts["layout"])]))
    summed = _summed(everyone, needed, {*derived, *same})
    behind = {name: same.get(name, name) for name in names if name not in derived}
    by_value = [name for name, metric in behind.items() if metric not in summed]
    values = {name: _combined_values(everyone, name, last) for name in by_value}
    _tell(comm, everyone, by_value, last)
    if not summed:
        return values
    results = _results_of_sums(comm, everyone, share, summed, derived)
    found = {name: values[name] if name in values else results[behind.get(name, name)] for name in names}
    return found


def _results_of_sums(comm, everyone, share, summed, derived):
    """The values that belong to the states of all ranks, by name."""
    sizes = {name: sum(int(np.prod(s)) for s in shapes) for name, (_, shapes) in summed.items()}
    flat = [np.ravel(s) for n in summed for s in share.states.get(n, [np.zeros(sizes[n])])]
    (total,) = comm.allreduce([tf.constant(np.concatenate([*flat, np.zeros(1)]))], "hvdext.metrics.states")
    pieces = np.split(total.numpy()[:-1], np.cumsum(list(sizes.values()))[:-1])
    parts = {
        name: _split(piece, shapes) for (name, (_, shapes)), piece in zip(summed.items(), pieces, strict=True)
    }
    results = {
        name: _result(share.metrics[name], name, states)
        for name, states in parts.items()
        if name in share.metrics
    }
    if derived and parts.keys() <= share.metrics.keys():
        made = share.results_with(parts)
        results |= {name: made[name] for name in derived}
    # A rank that has never had a batch may lack the metrics that the sums belong to.
    if any(name not in facts["layout"] for facts in everyone for name in summed):
        known = comm.allgather_object(results, "hvdext.metrics.results")
        results = {name: next(r[name] for r in known if name in r) for name in [*summed, *derived]}
    return results


def checked_reductions(reductions: Mapping[str, str] | None) -> dict[str, str]:
    """What the user has chosen, by name of the log.

    Raises:
        ValueError: if something else is chosen than there is.
    """
    chosen = dict(reductions or {})
    for name, reduction in chosen.items():
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"`reductions` must map names in the logs to one of {list(REDUCTIONS)}. "
                f"Received: reductions={{{name!r}: {reduction!r}}}."
            )
    return chosen


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


def _summed(everyone, names, other_names):
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
        by_value = name not in other_names and any(
            name in facts["values"] and name not in facts["layout"] for facts in everyone
        )
        if layouts and not by_value:
            summed[name] = layouts.pop()
        elif chosen.get(name) == "states":
            raise ValueError(
                "`reductions` may be 'states' for metrics of the model only. "
                f"Received: {name!r}, which is none."
            )
    return summed


def _same_metric(everyone, name):
    """The metric that all ranks have logged under another name; None if there is none."""
    found = [set(facts["same"].get(name, ())) for facts in everyone if name in facts["values"]]
    return min(set.intersection(*found), default=None)


def _combined_values(everyone, name, last):
    pairs = [(facts["values"][name], facts["samples"]) for facts in everyone if name in facts["values"]]
    values = [value for value, _ in pairs]
    match everyone[0]["reductions"].get(name):
        case "sum":
            value = sum(values)
        case "min":
            value = np.minimum.reduce(values)
        case "max":
            value = np.maximum.reduce(values)
        case None if last is not None and _is_of_a_batch(everyone, name, last):
            value = everyone[last]["values"][name]
        case _:
            value = weighted_mean(pairs)
    return _plain(value)


def _is_of_a_batch(everyone, name, last):
    is_a_metric = any(name in facts["unknown"] or name in facts["layout"] for facts in everyone)
    return name in everyone[last]["values"] and not is_a_metric


def _tell(comm, everyone, names, last):
    """Warns once of each name whose values differ, and of which nobody has said how to combine them."""
    told = comm.ledger.notes.setdefault(_TOLD, set())
    for name in names:
        values = [facts["values"][name] for facts in everyone if name in facts["values"]]
        is_one = all(np.array_equal(value, values[0], equal_nan=True) for value in values)
        if is_one or name in told or name in everyone[0]["reductions"]:
            continue
        told.add(name)
        if comm.rank == 0:
            warn(_advice(everyone, name, last))


def _advice(everyone, name, last):
    kind = next((facts["unknown"][name] for facts in everyone if name in facts["unknown"]), None)
    if kind is not None:
        return (
            f"The metric {name!r} is the mean of the ranks' values, weighted by samples, which need not be "
            f"its value for all samples: whether states of {kind} add up is not known. Pass "
            f"reductions={{{name!r}: 'states'}} if they do, otherwise 'sum', 'min', 'max', or 'mean' to "
            "keep it so."
        )
    made = "the mean of the ranks' values, weighted by samples"
    if last is not None and _is_of_a_batch(everyone, name, last):
        made = "what the last batch of all gave (as in Keras, if it is of that batch alone)"
    return (
        f"{name!r} in the logs belongs to no metric of the model; it is {made}. For the value of all "
        f"samples log the result of a keras.metrics.Mean that is an attribute of the model, or pass "
        f"reductions={{{name!r}: 'mean'}} (or 'sum', 'min', 'max')."
    )


def _result(metric, name, parts):
    """What `metric` makes of states that are not its own."""
    states = [
        tf.cast(tf.constant(part), variable.dtype)
        for part, variable in zip(parts, metric.variables, strict=True)
    ]
    result = metric.stateless_result(states)
    return _plain(result[name] if isinstance(result, dict) else result)


def _split(flat, shapes):
    parts = np.split(flat, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


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
