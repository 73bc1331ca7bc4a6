"""One set of weights out of the ranks' own: the mean, or the best rank's; then proof that all hold it.

    each rank says: samples, score, whether its weights are finite, a digest
    shares            = samples / sum of samples, or 1 for the best rank and 0 for the others
    floating variable = sum over ranks of share * value     (in float64, rounded once)
    integer variable  = largest of the ranks with a share   (the optimizer's `iterations`)
    batch normalization statistics are estimated anew       (on request)

Last, the ranks compare digests of what they hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.collectives.digest import check_equal, digest
from hvdext.collectives.finite import failing_ranks, is_finite
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.failures import on_all
from hvdext.common.log import warn
from hvdext.consensus import batch_statistics, perturbation, scoring
from hvdext.consensus.options import ConsensusOptions
from hvdext.consensus.weighted_sum import weighted_sums
from hvdext.gradients.buckets import buckets
from hvdext.keras_tools.derived import settle
from hvdext.keras_tools.optimizers import build
from hvdext.keras_tools.selection import path_of

_BUCKET_BYTES = 32_000_000  # that travel together


@dataclass(frozen=True, kw_only=True)
class ConsensusReport:
    """What became of the ranks' weights. Everything that goes by rank is in rank order.

    Attributes:
        take: "mean" or "best".
        samples: how many samples each rank has trained on; None where nobody counted.
        shares: each rank's weight in the common weights; their sum is 1.
        scores: each rank's score, lower is better; None if nothing was scored.
        distances: the Euclidean distance of each rank's weights from the common ones, over all floating
            weights of the model; NaN for a rank that was left out.
        skipped: the global ranks that were left out since their weights were not finite.
        digest: the SHA-256 of the common weights and optimizer state, the same on every rank.
        metrics_before: what each rank's own weights gave on the data of `evaluate`; None without data.
        metrics_after: what the common weights gave on each rank's data; None without data.
    """

    take: str
    samples: tuple[int, ...] | None
    shares: tuple[float, ...]
    scores: tuple[float, ...] | None
    distances: tuple[float, ...]
    skipped: tuple[int, ...]
    digest: str
    metrics_before: tuple[dict[str, float], ...] | None
    metrics_after: tuple[dict[str, float], ...] | None

    @property
    def largest_distance(self) -> float:
        """The distance of the rank that was farthest from the common weights."""
        return float(np.nanmax(self.distances))

    @property
    def mean_distance(self) -> float:
        """The mean of the ranks' distances from the common weights."""
        return float(np.nanmean(self.distances))


def unify(
    comm: Communicator,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | None,
    options: ConsensusOptions,
    samples: int | None,
    means: Sequence[np.ndarray] | None = None,
) -> ConsensusReport:
    """Gives all ranks the same weights; every rank must call it.

    Args:
        comm: the ranks.
        model: built.
        optimizer: whose state to agree on too; None: of none.
        options: how.
        samples: how many samples this rank has trained on; None: not known.
        means: what this rank brings instead of the values of `floats(model.weights)`.

    Raises:
        ValueError: on every rank alike, if the models differ or are not built, samples are needed and
            missing, weights are not finite (and none remain, or `options` say to raise), or no score is
            finite.
        RuntimeError: on every rank alike, if a rank cannot evaluate, score or find its batches (of the kind
            that `comm.failures` says), or if the ranks differ afterwards.
    """
    state = optimizer if options.optimizer_state else None
    if state is not None and model.built:
        build(state, model.trainable_variables)
    weights = floats(model.weights)
    variables = _agreed(weights, state)
    _require_alike(comm, options, model, variables, samples)
    before = _metrics(comm, model, options, "before")
    if means is not None:
        _assign(weights, means)
    reports = comm.allgather_object(_report(variables, samples), "hvdext.consensus.report")
    skipped = _left_out(comm, options, [report["nonfinite"] for report in reports])
    scores = _scores(comm, model, optimizer, options)
    everyones_samples = None if samples is None else [report["samples"] for report in reports]
    shares = _shares(options, comm.size, everyones_samples, scores, skipped)
    square = _take_common(comm, variables, weights, shares, reports)
    settle(model)
    mine = math.nan if comm.rank in skipped else math.sqrt(square)
    distances = comm.allgather_object(mine, "hvdext.consensus.distance")
    if options.reestimate_batch_norm is not None:
        _reestimate(comm, model, *options.reestimate_batch_norm)
    common = check_equal(comm, variables, "hvdext.consensus.digest")
    return ConsensusReport(
        take=options.take,
        samples=None if everyones_samples is None else tuple(everyones_samples),
        shares=tuple(shares),
        scores=None if scores is None else tuple(scores),
        distances=tuple(distances),
        skipped=tuple(comm.ranks[place] for place in skipped),
        digest=common,
        metrics_before=before,
        metrics_after=_metrics(comm, model, options, "after"),
    )


def floats(variables: Iterable) -> list:
    """Those with a floating dtype: what can be averaged."""
    return [v for v in variables if tf.as_dtype(v.dtype).is_floating]


# -- what is agreed on --------------------------------------------------------------------------------


def _agreed(weights, optimizer) -> list:
    """The model's floating weights and the optimizer's variables; layers' counters and seeds stay."""
    state = optimizer.variables if optimizer is not None else []
    return list({id(v): v for v in [*weights, *state]}.values())


def _is_exact(variable) -> bool:
    """True for what no mean makes sense of: integers, and a loss scale, which must stay a power of two."""
    return not tf.as_dtype(variable.dtype).is_floating or path_of(variable).endswith("dynamic_scale")


def _require_alike(comm, options, model, variables, samples):
    problem = None
    if not model.built:
        problem = f"The model must be built, or it has no weights. Received: the unbuilt {model.name!r}."
    elif samples is None and options.take == "mean" and options.weight_by == "samples":
        problem = "`samples` must be given with weight_by='samples' outside of `model.fit`. Received: None."
    elif samples is not None and (samples != int(samples) or samples < 0):
        problem = f"`samples` must be a whole number, at least 0. Received: samples={samples!r}."
    facts = options.facts() | {"problem": problem, "samples are given": samples is not None}
    facts["number of variables"] = len(variables)
    # Without paths: a rank that has made another model before may number its layers differently.
    for i, v in enumerate(variables):
        facts[f"variable {i}"] = f"{tuple(v.shape)} {tf.as_dtype(v.dtype).name}"
    agreement.check(comm, "hvd.callbacks.ConsensusAveraging", facts, problem)


def _report(variables, samples) -> dict:
    """What the others must know of this rank before anything is averaged."""
    return {
        "samples": None if samples is None else int(samples),
        "nonfinite": [path_of(v) for v in variables if not is_finite(v)],
        "exact": [tf.convert_to_tensor(v).numpy() for v in variables if _is_exact(v)],
        "digest": digest(variables),
    }


def _left_out(comm, options, nonfinite) -> list[int]:
    """The places of the ranks whose weights must not spread."""
    places = [place for place, paths in enumerate(nonfinite) if paths]
    if not places:
        return []
    views = "; ".join(failing_ranks(comm.ranks, nonfinite))
    if options.on_nonfinite == "raise":
        raise ValueError(
            f"Weights are not finite: {views}. Nothing was averaged; on_nonfinite='skip_rank' leaves such "
            "ranks out and gives them the others' mean."
        )
    if len(places) == comm.size:
        raise ValueError(f"No rank's weights are finite: {views}. There is nothing to average.")
    warn(f"Weights are not finite and left out: {views}.")
    return places


def _shares(options, size, samples, scores, skipped) -> list[float]:
    """Each rank's weight in the result."""
    remaining = [float(place not in skipped) for place in range(size)]
    if scores is not None:
        best = perturbation.best([s if r else math.nan for s, r in zip(scores, remaining, strict=True)])
        if best is None:
            raise ValueError(f"No rank's score is finite: {scores}. There is no best one to take.")
        return [float(place == best) for place in range(size)]
    amounts = remaining
    if options.weight_by == "samples":
        amounts = [n * r for n, r in zip(samples, remaining, strict=True)]
    if sum(amounts) == 0:  # nobody has trained: none counts more than another
        amounts = remaining
    return [amount / sum(amounts) for amount in amounts]


# -- what is exchanged --------------------------------------------------------------------------------


def _take_common(comm, variables, weights, shares, reports) -> float:
    """Assigns what all ranks take; returns this rank's squared distance from it over `weights`."""
    if len({report["digest"] for report in reports}) == 1:
        return 0.0
    square = _take_mean(comm, floats(variables), shares[comm.rank], {id(v) for v in weights})
    _take_exact(variables, [r["exact"] for r, share in zip(reports, shares, strict=True) if share > 0])
    return square


def _take_mean(comm, variables, share, weights=frozenset(), name="mean") -> float:
    """Assigns the ranks' weighted mean; returns this rank's squared distance from it over `weights`."""
    square = 0.0
    averaged = [v for v in variables if not _is_exact(v)]
    sizes = [tf.float64.size * math.prod(v.shape) for v in averaged]
    for number, places in enumerate(buckets(sizes, [None] * len(sizes), _BUCKET_BYTES)):
        mine = [tf.cast(tf.convert_to_tensor(averaged[place]), tf.float64) for place in places]
        totals = weighted_sums(comm, mine, share, f"hvdext.consensus.{name}.{number}")
        for place, value, total in zip(places, mine, totals, strict=True):
            variable = averaged[place]
            if id(variable) in weights:
                square += float(tf.reduce_sum(tf.math.squared_difference(value, total)))
            variable.assign(tf.cast(total, variable.dtype))
    return square


def _take_exact(variables, everyones):
    """The smallest loss scale, and of counters the largest."""
    exact = [v for v in variables if _is_exact(v)]
    for variable, *values in zip(exact, *everyones, strict=True):
        is_scale = tf.as_dtype(variable.dtype).is_floating
        variable.assign(functools.reduce(np.minimum if is_scale else np.maximum, values))


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


# -- what each rank does by itself, while the others wait ---------------------------------------------


def _everywhere(comm: Communicator, purpose: str, action: Callable[[], Any]) -> list:
    name = f"hvdext.consensus.{purpose}"
    return on_all(comm, action, f"ConsensusAveraging has failed ({purpose})", name)


def _metrics(comm, model, options, when):
    if options.evaluate is None:
        return None

    def evaluate():
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(options.evaluate)
        logs = model.evaluate(x, y, sample_weight=sample_weight, verbose=0, return_dict=True)
        return {name: float(value) for name, value in logs.items()}

    return tuple(_everywhere(comm, f"evaluate_{when}", evaluate))


def _scores(comm, model, optimizer, options) -> list[float] | None:
    if options.take != "best":
        return None
    score = options.score
    if score is None:
        score = scoring.loss_on(comm.broadcast_object(tuple(options.probe), 0, "hvdext.consensus.probe"))
    # A user's `score` may train, or update statistics: neither is a part of what is agreed on.
    variables = [*model.variables, *(optimizer.variables if optimizer is not None else [])]
    kept = [(v, tf.identity(v)) for v in variables]
    scores = scoring.gather(comm, functools.partial(score, model), "hvdext.consensus.score")
    for variable, value in kept:
        variable.assign(value)
    return scores


def _reestimate(comm, model, data, count):
    def find():
        inputs.extend(batch_statistics.first_inputs(data, count))

    def estimate():
        batch_statistics.reestimate(model, inputs)
        for v in statistics:
            if not is_finite(v):
                raise ValueError(f"The batches' statistics are not finite in {path_of(v)}.")

    inputs: list = []
    layers = batch_statistics.layers_of(model)
    statistics = [v for layer in layers for v in layer.non_trainable_variables]
    statistics = floats(statistics)
    _everywhere(comm, "batches", find)  # before the forward passes, in which layers may exchange
    _everywhere(comm, "statistics", estimate)
    _take_mean(comm, statistics, 1 / comm.size, name="statistics_mean")
