"""The known methods, each as one expression of the five answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import keras

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_number, require_whole
from hvdext.sync.parameter_sync import ParameterSync
from hvdext.sync.rule import Corrected, Mean, Outer, Pull
from hvdext.sync.what import Matching, Rotating, What
from hvdext.sync.when import Always, Every
from hvdext.sync.whom import Pairs, Whom
from hvdext.sync.wire import Wire


@suggests_keywords
def LocalSGD(
    every: int,
    *,
    delay: int = 0,
    weight_by: str | None = None,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Local SGD: the ranks train on their own and average their weights now and then.

        1. each rank: `every` steps of its own optimizer on its own data
        2. x <- mean of the ranks' x

    All x Every x Everyone x Mean. Stich 2019, arXiv:1805.09767. With `delay`, step 2 takes place beside the
    training steps that follow and keeps what they learn.

    Args:
        every: steps between two averages, at least 1. With 1 and plain SGD it is synchronous SGD.
        delay: as in `hvd.sync.Every`.
        weight_by: as in `hvd.sync.Mean`.
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        _every(every, delay=delay),
        what=what,
        wire=wire,
        whom=whom,
        rule=Mean(weight_by),
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def PostLocalSGD(
    every: int,
    warmup_steps: int,
    *,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Post-local SGD: averages at every step first, then every `every` steps.

        1. for `warmup_steps` steps: one step on each rank, then x <- mean of the ranks' x
        2. from then on: local SGD, with averages at warmup_steps + every, warmup_steps + 2 every, ...

    All x Every(warmup_steps) x Everyone x Mean. Lin et al. 2020, arXiv:1808.07217. (PyTorch's
    `PostLocalSGDOptimizer` counts from there as well, and averages at warmup_steps + 1 already.)

    Args:
        every: steps between two averages after the warm-up, at least 1.
        warmup_steps: how many steps are averaged one by one, at least 0.
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        _every(every, warmup_steps=warmup_steps),
        what=what,
        wire=wire,
        whom=whom,
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def PartialSync(
    what: What | str | Sequence[str] | Callable,
    every: int = 1,
    *,
    delay: int = 0,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    rule: Mean | Pull | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Partial sync: averages a part of the model; the rest is each rank's own.

        1. each rank: `every` steps
        2. x[part] <- mean of the ranks' x[part]

    Matching x Every x Everyone x Mean. Shared layers with personal heads, as in FedPer (Arivazhagan et al.
    2019, arXiv:1912.00818); with `Rotating`, a different part each time, as in partial parameter averaging
    (Lee et al. 2023, arXiv:2201.03789).

    Args:
        what: a pattern on variable paths such as "*/kernel", several, a function of a variable, or an answer
            such as `~hvd.sync.Matching("head/*")` or `hvd.sync.Rotating(4)`.
        every: steps between two exchanges of one part, at least 1.
        delay: as in `hvd.sync.Every`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        rule: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    if not isinstance(what, What):
        what = Matching(*what) if isinstance(what, (list, tuple)) else Matching(what)
    return ParameterSync(
        _every(every, delay=delay),
        what=what,
        wire=wire,
        whom=whom,
        rule=rule,
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def SMA(
    every: int = 1,
    alpha: float | None = None,
    momentum: float = 0.9,
    *,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Synchronous model averaging: each rank is corrected towards a central model, which has momentum.

        every `every` steps, with gradient and correction taken at the same x:
        1. k = alpha (x - c)
        2. x <- x - (step of the rank's optimizer) - k
        3. c <- c + sum of the ranks' k + momentum (c - the c before)

    All x Every(delay=1) x Everyone x Corrected. Koliousis et al. 2019, "Crossbow", PVLDB 12(11), algorithm 1,
    arXiv:1901.02244, with plain SGD on each rank; there the result is c. To end with one model, add
    `hvd.callbacks.ConsensusAveraging()`.

    Args:
        every: steps between two exchanges, at least 1.
        alpha: in (0, 1]; None: 1 / number of ranks.
        momentum: of the central model, in [0, 1).
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`; ranks that meet must always be the same.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        _every(every, delay=1),
        what=what,
        wire=wire,
        whom=whom,
        rule=Corrected(alpha, momentum),
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def EASGD(
    every: int = 10,
    alpha: float = 0.2,
    beta: float = 0.9,
    *,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Synchronous elastic averaging: the ranks and a centre pull at each other.

        1. each rank: `every` steps
        2. x <- x - alpha (x - c),  c <- (1 - beta) c + beta * mean of the ranks' x     (x, c from before)

    All x Every x Everyone x Pull(centre_rate). Zhang et al. 2015, arXiv:1412.6651, eqs. 5 and 6, where
    beta = alpha * number of ranks.

    Args:
        every: steps between two exchanges, at least 1.
        alpha: in (0, 1], the ranks' move towards the centre.
        beta: in (0, 1], the centre's move towards the ranks' mean.
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        _every(every),
        what=what,
        wire=wire,
        whom=whom,
        rule=Pull(alpha, beta),
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def DiLoCo(
    every: int,
    *,
    outer: keras.optimizers.Optimizer | None = None,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """DiLoCo: long local training, joined by an outer optimizer.

        1. each rank, from the common c: x = c, then `every` steps of the inner optimizer (that of `compile`)
        2. g = c - mean of the ranks' x
        3. c <- outer optimizer(c, g),  x <- c

    All x Every x Everyone x Outer. Douillard et al. 2023, arXiv:2311.08105.

    Args:
        every: inner steps per round, at least 1; the paper's range is 50 to 2000, with AdamW inside.
        outer: a plain Keras optimizer; default: the paper's SGD(0.7, momentum=0.9, nesterov=True), meant for
            hundreds of rounds. For a few dozen, less momentum (0.3 to 0.5) learns faster.
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        _every(every),
        what=what,
        wire=wire,
        whom=whom,
        rule=Outer(_outer(outer)),
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def StreamingDiLoCo(
    every: int,
    fragments: int,
    *,
    delay: int = 0,
    alpha: float = 0.0,
    outer: keras.optimizers.Optimizer | None = None,
    wire: str | Wire = "int4",
    by: str = "layers",
    order: str = "strided",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Streaming DiLoCo: DiLoCo piece by piece, in the background, with few bits.

        for fragment p, in its turn once every `every` steps, at step t:
        1. g = c[p] - mean of the ranks' x[p] at step t, while training goes on to step t + delay
        2. c[p] <- outer optimizer(c[p], g)
        3. x[p] <- alpha x[p] + (1 - alpha) c[p]

    Rotating x Every(delay) x Everyone x Outer(alpha). Douillard et al. 2025, arXiv:2501.18512, with strided
    fragments and 4 bits, as there.

    Args:
        every: steps between two turns of one fragment, at least `fragments`.
        fragments: in how many pieces the model is cut, at least 1.
        delay: steps that an exchange may take, below `every`. Training waits for one that takes longer.
        alpha: in [0, 1], the share of its own values that a rank keeps.
        outer: as in `DiLoCo`.
        by: as in `hvd.sync.Rotating`; "bytes" makes fragments equal where one layer is large.
        order: as in `hvd.sync.Rotating`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        _every(every, delay=delay),
        what=Rotating(fragments, by=by, order=order),
        wire=wire,
        whom=whom,
        rule=Outer(_outer(outer), alpha=alpha),
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def AsyncGossip(
    *,
    seed: int = 0,
    max_staleness: int | None = None,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Asynchronous gossip: random pairs average their weights all the time, nobody waits.

        each rank, for ever: train;   beside it, turn by turn:
        1. all ranks are matched in pairs (i, j) at random
        2. x_i <- x_i + (x_j - x_i) / 2  and the other way round, at the values of that moment;
           what training does meanwhile is kept

    All x Always x Pairs x Mean. AD-PSGD, Lian et al. 2018, arXiv:1710.06952.

    Args:
        seed: of the matching, the same on all ranks.
        max_staleness: as in `hvd.sync.Always`.
        whom: default: `hvd.sync.Pairs(seed)`, which needs an even number of ranks.
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.
    """
    return ParameterSync(
        Always(max_staleness),
        what=what,
        wire=wire,
        whom=whom if whom is not None else Pairs(seed),
        rule=Mean(),
        on_nonfinite=on_nonfinite,
    )


@suggests_keywords
def SlowMo(
    every: int,
    *,
    beta: float = 0.7,
    alpha: float = 1.0,
    what: What | None = None,
    wire: str | Wire = "float32",
    whom: Whom | None = None,
    on_nonfinite: str = "raise",
) -> ParameterSync:
    """Slow momentum over local SGD.

        1. each rank, from the common c: x = c, then `every` steps
        2. d = c - mean of the ranks' x
        3. v <- beta v + d,  c <- c - alpha v,  x <- c

    All x Every x Everyone x Outer(SGD(alpha, momentum=beta)). Wang et al. 2020, arXiv:1910.00643, whose slow
    momentum is u = v / (inner learning rate): the same iteration while that rate is constant.

    Args:
        every: steps per round, at least 1; the paper's tau.
        beta: in [0, 1), the slow momentum.
        alpha: above 0, the slow learning rate.
        what: as in `ParameterSync`.
        wire: as in `ParameterSync`.
        whom: as in `ParameterSync`.
        on_nonfinite: as in `ParameterSync`.

    Raises:
        ValueError: besides `ParameterSync`'s, if `beta` or `alpha` lies outside.
    """
    require_number("beta", beta, lambda beta: 0 <= beta < 1, "lie in [0, 1)")
    require_number("alpha", alpha, lambda alpha: 0 < alpha < math.inf, "be a number above 0")
    return ParameterSync(
        _every(every),
        what=what,
        wire=wire,
        whom=whom,
        rule=Outer(keras.optimizers.SGD(float(alpha), momentum=float(beta))),
        on_nonfinite=on_nonfinite,
    )


def _every(steps, **options):
    """An `Every` whose interval is called as the presets call it."""
    return Every(require_whole("every", steps, 1), **options)


def _outer(optimizer):
    """The paper's, unless given."""
    if optimizer is None:
        return keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`outer` must be a plain Keras optimizer, such as keras.optimizers.SGD(0.7, momentum=0.9). "
            f"Received: outer={optimizer!r}."
        )
    return optimizer
