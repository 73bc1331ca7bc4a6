"""`hvd.evaluate`: the metrics of all data, computed by all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hvdext.collectives.metric_sums import Share, checked_reductions, combine
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.failures import Told, raise_for, told
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice
from hvdext.common.log import warn
from hvdext.inference.predict.following import Following, follow
from hvdext.inference.predict.own_methods import (
    OwnMethod,
    own_method,
    require_independent_rows,
)
from hvdext.inference.predict.predict import VERBOSE
from hvdext.inference.predict.preflight import prepare, trace
from hvdext.inference.predict.progress import Progress
from hvdext.inference.predict.sources.raw import RawDataset, RawRows, listed_texts, raw_source
from hvdext.inference.predict.sources.source import Source, order_problem
from hvdext.inference.predict.sources.sources import DEFAULT_BATCH_SIZE, make_source
from hvdext.keras_tools.metrics import in_order, results_of


@suggests_keywords
def evaluate(
    model: keras.Model,
    x: Any,
    y: Any = None,
    batch_size: int | None = None,
    verbose: str | int = "auto",
    sample_weight: Any = None,
    *,
    parse: Callable[[tf.Tensor], Any] | None = None,
    return_dict: bool = False,
    reductions: Mapping[str, str] | None = None,
) -> Any:
    """What `model.evaluate(x, y, batch_size)` returns, on every rank, computed by all of them.

    Every rank calls it with the same model, data and arguments, and runs some of the batches. The states of
    metrics are added up over the ranks, so that the results are those of one process, but for the order in
    which floats are added. Which classes of your own are summed as well, and what becomes of others, is as in
    `hvd.callbacks.MetricAverageCallback`; of what a `test_step` of your own returns besides, Keras' answer is
    what the last batch of all gave. The model's metric objects keep this rank's part.

        loss, accuracy = hvd.evaluate(model, images, labels)

    Args:
        model: compiled, whole, with the same weights on every rank.
        x: as in `hvd.predict`; data sets and records hold the targets, too.
        y: the targets: arrays as `x`, or a folder of `.npy` files.
        batch_size: rows per batch; default 32. For arrays and folders only.
        verbose: as in `hvd.predict`; what rank 0 has done stands for all.
        sample_weight: weights of the rows, with `y`.
        parse: makes `(x, y)` or `(x, y, sample_weight)` of one serialized record.
        return_dict: whether to return a dict by name instead of a list.
        reductions: how to combine what, by its name in the logs: "mean" (weighted by rows), "sum", "min",
            "max" of the ranks' values, or "states" to add up the states of a metric.

    Returns:
        The loss, or a list of loss and metrics in Keras' order, or a dict.

    Raises:
        ValueError: on every rank alike, if an argument breaks its rule, there are no rows, or ranks differ in
            model, data or arguments.
        RuntimeError: on every rank alike, or an error of a more fitting class (`ValueError`, `OSError`), if
            the model or the data fails on one of them.
    """
    comm = current()
    own: OwnMethod | None = None
    raw: RawRows | RawDataset | None = None

    def check():
        require_choice("verbose", verbose, VERBOSE)
        checked_reductions(reductions)

    def make():
        nonlocal own, raw
        if not model.compiled:
            raise ValueError(
                "`model` must be compiled, with a loss or metrics. Received: a model that is not."
            )
        label = own_method(model, "evaluate", "make_test_function")
        if label is None:
            return make_source(x, y, sample_weight, batch_size, parse)
        source = make_source(listed_texts(x), y, sample_weight, batch_size, parse)
        raw = raw_source(source, label, batch_size, x=x, y=y, sample_weight=sample_weight)
        own = _own(model, label, raw, batch_size)
        return raw

    def build(source):
        return trace(model, source.spec()) if own is None else own(source.example())

    settings = {"reductions": sorted((reductions or {}).items())}
    source, _ = prepare(comm, "hvd.evaluate", model, make, settings, check, build)
    chosen = checked_reductions(reductions)
    level, following = verbose if comm.rank == 0 else 0, None
    if own is not None and raw is not None:
        if comm.size > 1:
            look = functools.partial(_states, model, own)
            require_independent_rows(comm, "hvd.evaluate", own, raw, look)
        run = functools.partial(_run_own, own, raw, comm, level)
    else:
        step, following = _step(comm, model, source)
        run = functools.partial(_run, model, step, following, source, comm, level)
    share, everyone = _shares(comm, model, source, chosen, run)
    _require_the_same_data(everyone)
    last = max(range(comm.size), key=lambda rank: everyone[rank].last_batch)
    if following is not None:
        following.finish(everyone[last].last_batch + 1)
    # Of a method of the model's own nobody knows whether it returns what its last batch gave.
    results = combine(comm, [one.facts for one in everyone], share, last if own is None else None)
    if not results:
        raise ValueError("`x` must have at least one row. Received: none.")
    unknown = sorted(chosen.keys() - results.keys())
    if unknown and comm.rank == 0:
        warn(f"`reductions` names {unknown}, but only {sorted(results)} have been logged.")
    if return_dict:
        return dict(sorted(results.items()))  # as Keras does it
    order = next(one.names for one in everyone if one.names)
    return [results[name] for name in order] if len(order) > 1 else results[order[0]]


class _Told(NamedTuple):
    """What a rank tells the others after its batches.

    Attributes:
        facts: of its share of the metrics.
        names: of the logs, in Keras' order; none without a batch.
        failure: what it tells of an error.
        last_batch: the number of the last batch that it has run; -1: none.
        seen: batches that it has gone through.
        landmarks: fingerprints of some of them.
    """

    facts: dict[str, Any]
    names: list[str]
    failure: Told | None
    last_batch: int
    seen: int
    landmarks: list[str]


def _shares(
    comm: Communicator,
    model: keras.Model,
    source: Source,
    reductions: Mapping[str, str],
    run: Callable[[], Any],
) -> tuple[Share, list[_Told]]:
    """Runs this rank's batches; returns its share of the metrics, and what every rank tells."""
    share, names, failure, last = Share(None, reductions), list[str](), None, -1
    try:
        logs, rows, last = run()
        if logs is not None:
            share = Share(model, reductions, rows).take_logs(logs)
            names = _in_keras_order(model, logs)
    except Exception as error:  # the user's model or data; the other ranks must hear of it
        failure = error
    mine = _Told(
        share.facts(),
        names,
        None if failure is None else told(failure),
        last,
        source.seen,
        list(source.landmarks),
    )
    everyone = comm.allgather_object(mine, "hvdext.evaluate.shares")
    raise_for(comm.ranks, [one.failure for one in everyone], "hvd.evaluate has failed", failure)
    return share, everyone


def _require_the_same_data(everyone: list[_Told]) -> None:
    problem = order_problem([one.landmarks for one in everyone])
    if problem is not None:
        raise ValueError(problem)
    seen = [one.seen for one in everyone]
    if len(set(seen)) > 1:
        raise ValueError(f"`x` must have the same batches on all ranks. Received, by rank: {seen} batches.")


def _run(model: keras.Model, step, following: Following | None, source: Source, comm: Communicator, verbose):
    """Runs this rank's batches; returns Keras' logs, None without a batch, the rows and the last batch."""
    model.reset_metrics()
    progress = Progress("evaluate", source.rows, source.batches, verbose)
    logs, rows, batches, last, size = None, 0, 0, -1, comm.size
    for last, (data, count) in source.share(comm.rank, size):
        if following is not None:
            following.go_to(last)
        logs = step(data)
        if following is not None:
            following.check(last + 1)
        rows, batches = rows + count, batches + 1
        progress.update(min(rows * size, source.rows or rows * size), batches * size)
    source.end()
    if logs is None:
        return None, 0, -1
    progress.finish(rows * size if source.rows is None else source.rows)
    return results_of(model, logs), rows, last


def _own(model: keras.Model, label: str, source: RawRows | RawDataset, batch_size: int | None) -> OwnMethod:
    """The model's own `evaluate`, or Keras', which runs the model's own functions."""
    names, wishes = [], {"verbose": 0}
    if isinstance(source, RawRows):
        names, wishes = source.names, wishes | {"batch_size": batch_size or DEFAULT_BATCH_SIZE}
    return OwnMethod(model, "evaluate", label, names, {"return_dict": True}, wishes)


def _run_own(own: OwnMethod, source: RawRows | RawDataset, comm: Communicator, verbose):
    """Lets the model's own method run this rank's batches; returns as `_run` does."""
    progress = Progress("evaluate", source.rows, source.batches, verbose)
    given, gone_through = source.given_to(comm.rank, comm.size)
    if given is None:
        return None, 0, -1
    logs = own(given)
    if not isinstance(logs, Mapping):
        raise ValueError(
            f"`model` must return a dict from {own.label} with return_dict=True. "
            f"Received: a {type(logs).__name__}."
        )
    rows, last = gone_through()
    progress.finish(rows * comm.size if source.rows is None else source.rows)
    return dict(logs), rows, last


def _states(model: keras.Model, own: OwnMethod, given: Any) -> list:
    """The sums that the model's metrics hold after a call of its own method."""
    own(given)
    states = Share(model, {}).states
    return [state for name in sorted(states) for state in states[name]]


def _step(comm: Communicator, model: keras.Model, source: Source):
    """What runs one batch and returns Keras' logs, and what goes on from batch to batch in it.

    Keras weighs the losses of single outputs by the batch size only if it is known before there is a batch.
    In `model.evaluate` it is not, and so it must not be here.
    """
    model.make_test_function()

    def step(data):
        return model.test_function(iter([data]))

    compiled, spec = tf.function(step, reduce_retracing=True, autograph=False), source.spec()

    def trace():
        return compiled.get_concrete_function(spec)

    is_eager, following = model.run_eagerly or spec is None, None
    if comm.size > 1:
        following = follow(
            comm,
            "hvd.evaluate",
            model,
            step,
            source.example(),
            trace=trace,
            is_eager=is_eager,
            between=model.reset_metrics,
        )
    return (step if is_eager else compiled), following


def _in_keras_order(model: keras.Model, logs: dict) -> list[str]:
    """The names of the logs, in the order of the list that `model.evaluate` returns."""
    ordered = in_order(model, {name: name for name in logs})
    return [ordered] if isinstance(ordered, str) else ordered
