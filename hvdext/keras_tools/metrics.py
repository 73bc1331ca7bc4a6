"""A model's metrics as Keras keeps them, and what Keras reads of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras

Logs = Mapping[str, Any]


def loss_tracker(model: keras.Model) -> keras.metrics.Mean | None:
    """The metric that averages the loss over an epoch; None before `compile`."""
    return model._loss_tracker


def compiled_metrics(model: keras.Model) -> Any:
    """The metric that holds those that the model was compiled with; None if there are none."""
    return model._compile_metrics


def results_of(model: keras.Model, logs: Logs) -> dict[str, Any]:
    """What `evaluate` returns as a dict, given the logs of the last step."""
    return dict(model._get_metrics_result_or_logs(logs))


def has_own_results(model: keras.Model) -> bool:
    """Whether the model makes its results of its metrics in its own way, in `get_metrics_result`."""
    return getattr(model.get_metrics_result, "__func__", None) is not keras.Model.get_metrics_result


def results_with(model: keras.Model, states: Mapping[int, Any]) -> dict[str, Any]:
    """What the model would make of other states of its metrics; these keep their own.

    Args:
        model: the model.
        states: by the `id` of a metric's variable.
    """
    mapping = [(v, states[id(v)]) for metric in model.metrics for v in metric.variables if id(v) in states]
    with keras.StatelessScope(state_mapping=mapping):
        return dict(model.get_metrics_result())


def in_order(model: keras.Model, logs: Logs) -> Any:
    """What `evaluate` returns of `logs` by default: a list in Keras' order, or one value."""
    return model._flatten_metrics_in_order(logs)


def change_next_results(model: keras.Model, change: Callable[[Logs], Logs]) -> None:
    """Has `change` called with what Keras reads next of the metrics, at the end of an evaluation.

    `evaluate` returns what it has read there, not what callbacks make of it. Several such functions are
    called one after the other, each with the results of those before it.

    Args:
        model: the model.
        change: returns what goes in place of, or besides, what it is given, by name. If it waits already it
            goes to the end of the queue.
    """
    reader = _reader_of(model)
    if reader is None:
        reader = model._get_metrics_result_or_logs = _Reader(model)
    reader.waiting = [other for other in reader.waiting if other != change] + [change]


def take_back(model: keras.Model, change: Callable[[Logs], Logs]) -> bool:
    """Undoes `change_next_results`, and says whether `change` was still waiting.

    Args:
        model: the model.
        change: as given there.
    """
    reader = _reader_of(model)
    if reader is None or change not in reader.waiting:
        return False
    reader.waiting.remove(change)
    return True


class _Reader:
    """Stands in front of Keras' reading of the metrics, once.

    Attributes:
        waiting: what is called with the results.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.waiting: list[Callable[[Logs], Logs]] = []

    def __call__(self, logs: Logs) -> dict[str, Any]:
        model = self._model
        del model._get_metrics_result_or_logs  # the model's own is its class's again
        compiled = compiled_metrics(model)
        # Metrics that have never had a batch cannot be read.
        is_readable = compiled is None or compiled.built
        results = results_of(model, logs) if is_readable else dict(logs)
        for change in self.waiting:
            results |= change(results)
        return results


def _reader_of(model) -> _Reader | None:
    found = model._get_metrics_result_or_logs
    return found if isinstance(found, _Reader) else None
