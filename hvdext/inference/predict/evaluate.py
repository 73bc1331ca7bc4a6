"""`hvd.evaluate`: the metrics of all data, computed by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from hvdext.collectives.metric_sums import Share, combine
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice
from hvdext.inference.predict.predict import VERBOSE
from hvdext.inference.predict.preflight import prepare
from hvdext.inference.predict.progress import Progress
from hvdext.inference.predict.sources.source import Source, order_problem
from hvdext.inference.predict.sources.sources import make_source
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
) -> Any:
    """What `model.evaluate(x, y, batch_size)` returns, on every rank, computed by all of them.

    Every rank calls it with the same model, data and arguments, and runs some of the batches. The states of
    Keras' own metrics are added up over the ranks, so that the results are those of one process, but for the
    order in which floats are added. Values of other metrics are averaged, weighted by rows. The model's
    metric objects keep this rank's part.

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

    Returns:
        The loss, or a list of loss and metrics in Keras' order, or a dict.

    Raises:
        ValueError: on every rank alike, if an argument breaks its rule, there are no rows, or ranks differ in
            model, data or arguments.
        RuntimeError: on every rank alike, if the model or the data fails on one of them.
    """
    comm = current()

    def check():
        require_choice("verbose", verbose, VERBOSE)

    def make():
        if not model.compiled:
            raise ValueError(
                "`model` must be compiled, with a loss or metrics. Received: a model that is not."
            )
        return make_source(x, y, sample_weight, batch_size, parse)

    source, _ = prepare(comm, "hvd.evaluate", model, make, {}, check)
    share, names, problem, cause = Share(None, {}), [], None, None
    try:
        level = verbose if comm.rank == 0 else 0
        logs = _run(model, source, comm.rank, comm.size, level)
        if logs is not None:
            share = Share(model, {}).take_logs(logs)
            names = _in_keras_order(model, logs)
    except Exception as error:
        problem, cause = f"rank {comm.rank}: {type(error).__name__}: {error}", error
    mine = (share.facts(), names, problem, source.seen, list(source.landmarks))
    everyone = comm.allgather_object(mine, "hvdext.evaluate.shares")
    problems = [found for _, _, found, _, _ in everyone if found is not None]
    if problems:
        raise RuntimeError(f"hvd.evaluate has failed: {'; '.join(problems)}") from cause
    problem = order_problem([landmarks for *_, landmarks in everyone])
    if problem is not None:
        raise ValueError(problem)
    seen = [count for _, _, _, count, _ in everyone]
    if len(set(seen)) > 1:
        raise ValueError(f"`x` must have the same batches on all ranks. Received, by rank: {seen} batches.")
    results = combine(comm, [facts for facts, *_ in everyone], share)
    if not results:
        raise ValueError("`x` must have at least one row. Received: none.")
    if return_dict:
        return dict(sorted(results.items()))  # as Keras does it
    order = next(names for _, names, *_ in everyone if names)
    return [results[name] for name in order] if len(order) > 1 else results[order[0]]


def _run(model: keras.Model, source: Source, rank: int, size: int, verbose: str | int) -> dict | None:
    """Runs this rank's batches; returns Keras' logs, None without a batch."""
    model.reset_metrics()
    step = _step(model, source.spec())
    progress = Progress("evaluate", source.rows, source.batches, verbose)
    logs, rows, batches = None, 0, 0
    for data, count in source.share(rank, size):
        logs = step(data)
        rows, batches = rows + count, batches + 1
        progress.update(min(rows * size, source.rows or rows * size), batches * size)
    source.end()
    if logs is None:
        return None
    progress.finish(rows * size if source.rows is None else source.rows)
    return results_of(model, logs)


def _step(model: keras.Model, spec: Any) -> Callable[[Any], dict]:
    """Runs one batch and returns Keras' logs.

    Keras weighs the losses of single outputs by the batch size only if it is known before there is a batch.
    In `model.evaluate` it is not, and so it must not be here.
    """
    model.make_test_function()

    def step(data):
        return model.test_function(iter([data]))

    if model.run_eagerly or spec is None:
        return step
    compiled = tf.function(step, reduce_retracing=True, autograph=False)
    compiled.get_concrete_function(spec)
    return compiled


def _in_keras_order(model: keras.Model, logs: dict) -> list[str]:
    """The names of the logs, in the order of the list that `model.evaluate` returns."""
    ordered = in_order(model, {name: name for name in logs})
    return [ordered] if isinstance(ordered, str) else ordered
