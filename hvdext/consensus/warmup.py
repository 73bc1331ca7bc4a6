"""Before training: every rank tries weights of its own near the root's, then all agree on one set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from hvdext.collectives.digest import check_equal
from hvdext.collectives.finite import failing_ranks, is_finite
from hvdext.collectives.variables import broadcast_variables
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.once import Once
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice, require_whole
from hvdext.common.wording import describe
from hvdext.consensus import perturbation, scoring
from hvdext.consensus.weighted_sum import weighted_sums
from hvdext.keras_tools.derived import settle
from hvdext.keras_tools.models import is_built, model_variables
from hvdext.keras_tools.optimizers import build, with_members
from hvdext.keras_tools.selection import Select, check_select, path_of, selected

_NAME = "hvd.callbacks.WarmupPerturbation"
_SKIPS = "whether to do nothing (the optimizer has made updates, or the callback has run for the model)"
_UNIFY = ("average", "best", "root")

Weights = dict[int, np.ndarray]  # by the variable's place among the model's trainable variables


class WarmupPerturbation(keras.callbacks.Callback):
    """Searches for better initial weights with all ranks, before the first update.

    When training begins:

        the root's weights, statistics and optimizer state reach all ranks
        `rounds` times:
            every rank but the root adds noise to a part of its weights; this is its candidate
            every rank scores its candidate on the same probe batch
            all unify: the mean of the candidates, the best one, or the root's
        the ranks compare digests of all variables: they hold the same bits

    The root's own candidate is the weights as they are, so that "best" never makes the score worse. The noise
    follows from `seed`, round, rank and variable; the ranks' global random generators are not touched.
    Variables other than the perturbed ones stay the root's.

    Runs in the first `fit` of a model that starts from scratch, which is one whose optimizer has made no
    update yet; it does nothing when a fit is resumed or continued, unless `every_fit=True`. Put it after
    callbacks that restore a backup and before those that remember initial weights. In a custom loop call
    `set_model(model)` and `on_train_begin()`.

    Averaging models that differ a little, and weighing or choosing by score, is after Wortsman et al., "Model
    soups" (2022, arXiv:2203.05482); noise on copies and going on from the best after Jaderberg et al.,
    "Population based training" (2017, arXiv:1711.09846).

    Args:
        fraction: the part of each selected variable's elements that gets noise, in (0, 1]: the nearest whole
            number of elements, at least one.
        scale: the noise's standard deviation, in standard deviations of the variable's own elements; above 0.
            A variable whose elements are all equal (biases at zero, scales at one) has no deviation and stays
            as it is.
        distribution: "normal", or "uniform" with the same standard deviation.
        seed: of the noise; a whole number from 0 on.
        unify: "average": the mean of all candidates, in float32 (float64 for float64 variables). "best": the
            candidate with the lowest score, the lowest rank's of several; needs `probe` or `score`. "root":
            the root's candidate; with `probe` or `score` it tells how rough the surroundings are.
        probe: a batch (inputs, targets) or (inputs, targets, sample weights), the same kind as `fit` trains
            on. Every rank passes one, and the root's is sent to all. The score is the compiled model's loss
            on it, without dropout.
        score: instead of `probe`, a function `score(model) -> float` of the model that holds the candidate;
            lower is better. What it changes in the model's or the optimizer's variables is undone. It may
            raise: all ranks then end with the same error.
        weight_by: with "average", None: all candidates weigh the same. "score": candidate r weighs
            `exp(-score_r) / sum over k of exp(-score_k)`, the softmax of the negative scores; needs `probe`
            or `score`. A score that is not finite weighs 0.
        rounds: how often, at least 1; each round goes on from the last one's unified weights.
        select: which trainable variables get noise: a pattern on variable paths such as `"*/kernel"`, a list
            of patterns, or a function of a variable. None: all.
        root_rank: the rank whose weights all start from.
        every_fit: whether to run at the beginning of every `fit`, resumed ones too.
        verbose: 1: rank 0 prints a line per round.

    Attributes:
        scores: one list per round, with each rank's score in rank order; empty without `probe` or `score`.
        chosen: per round the rank whose candidate all took, None for a mean.
        weights: one list per round, with each candidate's weight in what all took; their sum is 1.

    Raises:
        ValueError: if an argument breaks its rule. When training begins, on every rank alike: if the model is
            not built, the ranks' settings or models differ, `root_rank` does not exist, `select` matches
            nothing or only variables without deviation, a rank's weights or candidate are not finite, or
            a choice is to be made and no score is finite.
        RuntimeError: when training begins, if `hvd.init()` has not been called; on every rank alike, if a
            rank cannot score its candidate or the digests differ.
    """

    @suggests_keywords
    def __init__(
        self,
        fraction: float = 0.1,
        scale: float = 0.1,
        *,
        distribution: str = "normal",
        seed: int = 0,
        unify: str = "average",
        probe: tuple | None = None,
        score: scoring.Score | None = None,
        weight_by: str | None = None,
        rounds: int = 1,
        select: Select = None,
        root_rank: int = 0,
        every_fit: bool = False,
        verbose: int = 1,
    ):
        super().__init__()
        self._noise = perturbation.Perturbation(fraction, scale, distribution, seed)
        _require_unify(unify, weight_by, probe, score)
        check_select(select)
        self._unify = unify
        self._weight_by = weight_by
        self._probe = probe
        self._score = score
        self._rounds = require_whole("rounds", rounds, 1)
        self._select = select
        self._root_rank = require_whole("root_rank", root_rank, 0)
        self._every_fit = every_fit
        self._verbose = verbose
        self._once = Once()
        self.scores: list[list[float]] = []
        self.chosen: list[int | None] = []
        self.weights: list[list[float]] = []

    def on_train_begin(self, logs=None):
        comm = current()
        places, problem = self._places(comm)
        skips = self._skips(comm)
        agreement.check(comm, _NAME, self._settings(places) | {_SKIPS: skips}, problem)
        if skips:
            return
        self.scores, self.chosen, self.weights = [], [], []
        self._warm_up(comm, places)
        self._once.note(self.model, comm)

    # -- do all ranks mean the same? -----------------------------------------------------------------

    def _places(self, comm) -> tuple[list[int], str | None]:
        """The places of the variables that get noise, and what is wrong with the model or the settings."""
        if not is_built(self.model):
            return [], (
                f"`WarmupPerturbation` needs a built model, whose weights exist when training begins: begin "
                f"it with a keras.Input or call it once. Received: the unbuilt {self.model.name!r}."
            )
        if self._root_rank >= comm.size:
            return [], (
                f"`root_rank` must be one of the ranks {list(range(comm.size))}. "
                f"Received: root_rank={self._root_rank!r}."
            )
        try:
            chosen = selected(self.model.trainable_variables, self._select)
        except Exception as error:  # a predicate is the user's own code: the others must hear of it
            failed = "" if isinstance(error, ValueError) else "`select` has failed: "
            return [], f"{failed}{describe(error)}"
        return [place for place, is_chosen in enumerate(chosen) if is_chosen], None

    def _skips(self, comm) -> bool:
        if self._every_fit:
            return False
        if self._once.is_done(self.model, comm):
            return True
        return _updates(getattr(self.model, "optimizer", None)) > 0

    def _settings(self, places):
        # Without paths: a rank that has made another model before may number its layers differently.
        shapes = [f"{tuple(v.shape)} {tf.as_dtype(v.dtype).name}" for v in self.model.trainable_variables]
        return {
            "fraction": self._noise.fraction,
            "scale": self._noise.scale,
            "distribution": self._noise.distribution,
            "seed": self._noise.seed,
            "unify": self._unify,
            "weight_by": self._weight_by,
            "probe is given": self._probe is not None,
            "score is given": self._score is not None,
            "rounds": self._rounds,
            "root_rank": self._root_rank,
            "trainable variables": shapes,
            "selected, by place": places,
        }

    # -- the rounds ----------------------------------------------------------------------------------

    def _warm_up(self, comm, places):
        model = self.model
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None:
            build(optimizer, model.trainable_variables)
        _require_finite(comm, [(path_of(v), _value(v)) for v in model.variables])
        shared = model_variables(model)
        broadcast_variables(shared, self._root_rank)
        settle(model)

        score = self._scorer(comm)
        variables = {place: model.trainable_variables[place] for place in places}
        weights = {place: _value(variable) for place, variable in variables.items()}
        _require_spread(weights, variables, self._select)
        start = [(variable, _value(variable)) for variable in shared]
        for turn in range(self._rounds):
            weights = self._round(comm, turn, weights, variables, score)
            for variable, value in start:  # a user's `score` may have trained, or updated statistics
                variable.assign(value)
            _assign(variables, weights)
        check_equal(comm, shared, "hvdext.warmup.digest")

    def _round(self, comm, turn, weights: Weights, variables, score) -> Weights:
        """What all ranks hold after round `turn`, which begins with `weights`."""
        mine = weights
        if comm.rank != self._root_rank:
            mine = self._noise.candidate(weights, turn=turn, rank=comm.rank)
        _require_finite(comm, [(path_of(variables[place]), value) for place, value in mine.items()])
        if score is not None:
            _assign(variables, mine)
            self.scores.append(scoring.gather(comm, score, "hvdext.warmup.score"))
        chosen, shares = self._choice(comm)
        if chosen is None:
            unified = _mean(comm, weights, mine, shares[comm.rank])
        else:
            unified = _candidate_of(comm, mine, chosen)
        self.chosen.append(None if chosen is None else comm.ranks[chosen])
        self.weights.append(shares)
        if self._verbose and comm.rank == 0:
            print(self._line())
        return unified

    def _scorer(self, comm) -> Callable[[], float] | None:
        """This rank's score of what the model holds."""
        if self._score is not None:
            return functools.partial(self._score, self.model)
        if self._probe is None:
            return None
        probe = comm.broadcast_object(tuple(self._probe), self._root_rank, "hvdext.warmup.probe")
        return functools.partial(scoring.loss_on(probe), self.model)

    def _choice(self, comm) -> tuple[int | None, list[float]]:
        """Whose candidate all take (None: the mean), and every candidate's weight."""
        if self._unify == "average" and self._weight_by is None:
            return None, [1 / comm.size] * comm.size
        if self._unify == "root":
            return _only(comm, self._root_rank)
        scores = self.scores[-1]
        best = perturbation.best(scores)
        if best is None:
            views = [f"rank {rank}: {score}" for rank, score in zip(comm.ranks, scores, strict=True)]
            raise ValueError(f"{_NAME}: no candidate has a finite score: {'; '.join(views)}.")
        if self._unify == "average":
            return None, perturbation.quality(scores)
        return _only(comm, best)

    def _line(self):
        line = f"Warm-up, round {len(self.chosen)} of {self._rounds}: "
        if self.scores:
            line += "scores by rank " + ", ".join(f"{score:.6g}" for score in self.scores[-1]) + "; "
        if self.chosen[-1] is not None:
            return line + f"all take rank {self.chosen[-1]}'s weights"
        shares = ", ".join(f"{share:.4g}" for share in self.weights[-1])
        return line + f"all take the mean, the ranks weighing {shares}"


def _only(comm, chosen):
    return chosen, [float(place == chosen) for place in range(comm.size)]


# -- what is exchanged --------------------------------------------------------------------------------


def _mean(comm: Communicator, base: Weights, mine: Weights, share: float) -> Weights:
    """The weighted mean of all ranks' candidates: base + sum over ranks of share * (candidate - base).

    All ranks hold the same `base`. By way of the differences, what no rank has perturbed stays exactly what
    it was, also where the shares' sum is not exactly 1.
    """
    unified = dict(base)
    for dtype in (np.float32, np.float64):
        places = [place for place, value in base.items() if _wide(value) is dtype]
        if not places:
            continue
        steps = [tf.constant(mine[place].astype(dtype) - base[place].astype(dtype)) for place in places]
        totals = weighted_sums(comm, steps, share, f"hvdext.warmup.mean.{np.dtype(dtype).name}")
        for place, total in zip(places, totals, strict=True):
            unified[place] = (base[place].astype(dtype) + total.numpy()).astype(base[place].dtype)
    return unified


def _wide(value):
    """The type in which a mean of such values is worked out."""
    return np.float64 if value.dtype == np.float64 else np.float32


def _candidate_of(comm: Communicator, mine: Weights, chosen: int) -> Weights:
    received = comm.broadcast([tf.constant(value) for value in mine.values()], chosen, "hvdext.warmup.chosen")
    return {place: value.numpy() for place, value in zip(mine, received, strict=True)}


# -- checks -------------------------------------------------------------------------------------------


def _require_unify(unify, weight_by, probe, score):
    require_choice("unify", unify, _UNIFY)
    require_choice("weight_by", weight_by, (None, "score"))
    if weight_by is not None and unify != "average":
        raise ValueError(
            f"`weight_by` needs unify='average'. Received: weight_by={weight_by!r} with unify={unify!r}."
        )
    if score is not None and not callable(score):
        raise TypeError(f"`score` must be a function of a model. Received: score={score!r}.")
    if probe is not None:
        if score is not None:
            raise ValueError("`probe` must be left out where `score` is given. Received: both.")
        if not (isinstance(probe, (tuple, list)) and 1 <= len(probe) <= 3):
            raise ValueError(
                "`probe` must be a batch: (inputs, targets) or (inputs, targets, sample weights), of a "
                f"tf.data.Dataset `next(iter(dataset))`. Received: probe of type {type(probe).__name__}."
            )
    if probe is None and score is None and (unify == "best" or weight_by == "score"):
        asked = "unify='best'" if unify == "best" else "weight_by='score'"
        raise ValueError(f"`probe` (or `score`) must be given with {asked}. Received: probe=None.")


def _require_finite(comm: Communicator, values: Sequence[tuple[str, np.ndarray]]) -> None:
    """Refuses values that are not finite, on every rank alike.

    Args:
        comm: whose ranks; each of them must call it.
        values: this rank's, with their paths.
    """
    bad = [path for path, value in values if not is_finite(value)]
    failing = failing_ranks(comm.ranks, comm.allgather_object(bad, "hvdext.warmup.finite"))
    if failing:
        raise ValueError("\n  ".join([f"{_NAME} needs finite weights. These are not:", *failing]))


def _require_spread(weights: Weights, variables, select):
    """Alike on every rank: all hold the root's weights."""
    if not any(perturbation.deviation(value) for value in weights.values()):
        paths = [path_of(variable) for variable in variables.values()]
        raise ValueError(
            "`select` must match at least one variable whose elements differ: noise is in proportion to "
            f"their deviation. Received: select={select!r}, which matches {paths}."
        )


# -- variables ----------------------------------------------------------------------------------------


def _value(variable) -> np.ndarray:
    return tf.convert_to_tensor(variable).numpy()


def _assign(variables, weights: Weights) -> None:
    for place, value in weights.items():
        variables[place].assign(value)


def _updates(optimizer) -> int:
    """How many updates an optimizer has made, also one of several for different variables."""
    if optimizer is None:
        return 0
    return max(int(one.iterations) for one in with_members(optimizer))
