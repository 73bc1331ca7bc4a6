"""Every rule and schedule of parameter sync, step by step against a simulation in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tests.multiprocess.programs import sync_simulation as simulation
from tests.multiprocess.programs.exchange_programs import Program

STEPS = 26


@dataclass(frozen=True)
class Case:
    """A sync, and the simulation that it must equal.

    Attributes:
        sync: makes it, from hvd.sync.
        rule: makes the simulation's rule, from the number of ranks; None with `mixing`.
        options: of `simulate`.
        mixing: from (ranks, turn) to a matrix.
        sizes: numbers of ranks.
    """

    sync: Callable[[Any], Any]
    rule: Callable[[int], Any] | None = None
    options: dict = field(default_factory=dict)
    mixing: Callable[[int, int], np.ndarray] | None = None
    sizes: tuple[int, ...] = (2, 3, 4)


def build_model():
    """Four layers of one kernel each."""
    layers = [
        keras.layers.Dense(width, use_bias=False, name=f"layer{i}")
        for i, width in enumerate(simulation.WIDTHS)
    ]
    one = keras.Input((1,))
    return keras.Model(one, [layer(one) for layer in layers])


def put(model, row):
    for variable, layer in zip(model.variables, simulation.LAYERS, strict=True):
        variable.assign(row[layer].reshape(variable.shape))


def get(model):
    return np.concatenate([np.ravel(variable.numpy()) for variable in model.variables])


def train(model, rank, step):
    put(model, get(model) + simulation.update(rank, step))


def play(case, sync, rank):
    """This rank's weights after each step."""
    model = build_model()
    put(model, simulation.start(rank))
    sync.begin(model)
    history = []
    for step in range(1, STEPS + 1):
        train(model, rank, step)
        sync.step(samples=simulation.samples(rank, step))
        history.append(get(model))
    sync.end()
    return history


def check(case, ranks):
    """`ranks`: what `play` returned on each."""
    n = len(ranks)
    rule = case.rule(n) if case.rule else None
    mixing = (lambda turn: case.mixing(n, turn)) if case.mixing else None
    expected = simulation.simulate(n, STEPS, rule=rule, mixing=mixing, **case.options)
    found = np.array(ranks).transpose(1, 0, 2)
    for t in range(STEPS):
        np.testing.assert_allclose(found[t], expected[t], rtol=0, atol=3e-5, err_msg=f"after step {t + 1}")


def pairs(n, turn, seed=3):
    """The matching that the seed gives: neighbours in a shuffled line."""
    line = np.random.default_rng([seed, turn]).permutation(n)
    matrix = np.eye(n) / 2
    for a, b in line.reshape(-1, 2):
        matrix[a, b] = matrix[b, a] = 0.5
    return matrix


def ring(n, turn):
    matrix = np.zeros((n, n))
    for i in range(n):
        for j in {i, (i + 1) % n, (i - 1) % n}:
            matrix[i, j] = 1
    return matrix / matrix.sum(axis=1, keepdims=True)


def exponential(n, turn):
    distance = 2 ** (turn % int(np.ceil(np.log2(n))))
    return (np.eye(n) + np.roll(np.eye(n), distance, axis=0)) / 2


def two_pairs_then_all(n, turn):
    if turn % 3 == 2:
        return np.full((n, n), 1 / n)
    return np.kron(np.full((2, 2), 0.5), np.eye(2))  # 0 with 2, 1 with 3


def _streaming(fragments, delay, alpha):
    rate, momentum = 0.6, 0.5
    return Case(
        lambda s: s.StreamingDiLoCo(
            every=8,
            fragments=fragments,
            delay=delay,
            alpha=alpha,
            outer=keras.optimizers.SGD(rate, momentum=momentum, nesterov=True),
            wire="float32",
        ),
        lambda n: simulation.OuterRule(n, rate, momentum, nesterov=True, alpha=alpha),
        {"every": 8, "fragments": fragments, "delay": delay},
    )


_LAYER_1 = np.zeros(simulation.SIZE, bool)
_LAYER_1[simulation.LAYERS[1]] = True

CASES = {
    "average every step": Case(lambda s: s.LocalSGD(1), simulation.MeanRule, {"every": 1}),
    "local SGD": Case(lambda s: s.LocalSGD(4), simulation.MeanRule, {"every": 4}),
    "local SGD, delayed": Case(
        lambda s: s.LocalSGD(5, delay=3), simulation.MeanRule, {"every": 5, "delay": 3}
    ),
    "local SGD, by samples": Case(
        lambda s: s.LocalSGD(4, weight_by="samples"),
        lambda n: simulation.MeanRule(n, "samples"),
        {"every": 4},
    ),
    "local SGD, by samples, delayed, in fragments": Case(
        lambda s: s.PartialSync(s.Rotating(3), 6, delay=2, rule=s.Mean("samples")),
        lambda n: simulation.MeanRule(n, "samples"),
        {"every": 6, "fragments": 3, "delay": 2},
    ),
    "local SGD, by steps": Case(
        lambda s: s.LocalSGD(3, weight_by="steps"), lambda n: simulation.MeanRule(n, "steps"), {"every": 3}
    ),
    "post-local SGD": Case(
        lambda s: s.PostLocalSGD(5, warmup_steps=7), simulation.MeanRule, {"every": 5, "warmup": 7}
    ),
    "one layer": Case(
        lambda s: s.PartialSync("layer1/*", 3), simulation.MeanRule, {"every": 3, "only": _LAYER_1}
    ),
    "all but one layer": Case(
        lambda s: s.PartialSync(~s.Matching("layer1/*"), 3),
        simulation.MeanRule,
        {"every": 3, "only": ~_LAYER_1},
    ),
    "SMA": Case(
        lambda s: s.SMA(3, alpha=0.3, momentum=0.8),
        lambda n: simulation.CorrectedRule(n, 0.3, 0.8),
        {"every": 3, "delay": 1},
    ),
    "pull": Case(
        lambda s: s.ParameterSync(s.Every(3), rule=s.Pull(0.3)),
        lambda n: simulation.PullRule(n, 0.3),
        {"every": 3},
    ),
    "EASGD": Case(
        lambda s: s.EASGD(3, alpha=0.2, beta=0.7),
        lambda n: simulation.ElasticRule(n, 0.2, 0.7),
        {"every": 3},
    ),
    "DiLoCo": Case(
        lambda s: s.DiLoCo(6, outer=keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)),
        lambda n: simulation.OuterRule(n, 0.7, 0.9, nesterov=True),
        {"every": 6},
    ),
    "SlowMo": Case(
        lambda s: s.SlowMo(6, beta=0.6, alpha=0.9),
        lambda n: simulation.OuterRule(n, 0.9, 0.6),
        {"every": 6},
    ),
    "pairs": Case(lambda s: s.LocalSGD(3, whom=s.Pairs(3)), options={"every": 3}, mixing=pairs, sizes=(2, 4)),
    "ring": Case(lambda s: s.LocalSGD(3, whom=s.Ring()), options={"every": 3}, mixing=ring),
    "exponential": Case(
        lambda s: s.LocalSGD(3, whom=s.Exponential()), options={"every": 3}, mixing=exponential
    ),
    "pull within pairs": Case(
        lambda s: s.ParameterSync(s.Every(3), rule=s.Pull(0.5), whom=s.Pairs(3)),
        options={"every": 3},
        mixing=lambda n, turn: 0.5 * np.eye(n) + 0.5 * pairs(n, turn),
        sizes=(2, 4),
    ),
    "inside a host, every third turn between": Case(
        lambda s: s.LocalSGD(2, whom=s.Hierarchical([[0, 2], [1, 3]], every=3)),
        options={"every": 2},
        mixing=two_pairs_then_all,
        sizes=(4,),
    ),
}
# Any two of the three numbers meet in one of these, as in a Latin square.
STREAMING = {
    f"streaming DiLoCo, {fragments} fragments, delay {delay}, alpha {alpha}": _streaming(
        fragments, delay, alpha
    )
    for fragments in (1, 2, 3, 4)
    for delay in range(6)
    for alpha in [(0.0, 0.5, 1.0)[(fragments + delay) % 3]]
}
_FEW = [
    name
    for name in STREAMING
    if name.split(", ", 1)[1]
    in (
        "1 fragments, delay 5, alpha 0.0",
        "3 fragments, delay 1, alpha 0.5",
        "4 fragments, delay 4, alpha 1.0",
    )
]


def _program(name, case):
    def run(hvd):
        return play(case, case.sync(hvd.sync), hvd.rank())

    # Where all meet all, two ranks, and threads in threes and fours, see what four ranks would.
    apart = case.mixing is not None or name in _FEW
    sizes = tuple(n for n in case.sizes if n == 2 or (apart and n == 4))
    return Program(run, lambda ranks: check(case, ranks), sizes)


PROGRAMS = {
    f"sync: {name}": _program(name, case)
    for name, case in (CASES | {name: STREAMING[name] for name in _FEW}).items()
}
