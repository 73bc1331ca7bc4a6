"""The warm-up on real ranks: they end as one process would that tries every candidate."""

from __future__ import annotations

import keras
import numpy as np

from hvdext.consensus.perturbation import Perturbation
from tests.multiprocess.programs.exchange_programs import Program

X = np.random.default_rng(3).normal(size=(8, 3)).astype("float32")
Y = (X @ np.float32([[1.0], [-2.0], [0.5]])).astype("float32")
ROOT = 1
NOISE = {"fraction": 0.7, "scale": 0.6, "seed": 2}
MODES = {
    "best": {"unify": "best", "rounds": 3},
    "average": {"weight_by": "score", "rounds": 2},
    "root": {"unify": "root"},
}


def _kernel(rank):
    return np.random.default_rng(rank).normal(size=(3, 1)).astype("float32")


def _model(rank):
    layer = keras.layers.Dense(1, name="out")
    model = keras.Sequential([keras.Input((3,)), layer], name="linear")
    layer.kernel.assign(_kernel(rank))
    layer.bias.assign([rank])
    model.compile(keras.optimizers.SGD(0.1 * (rank + 1)), "mse", jit_compile=False)
    return model


def _begin(hvd, model, **options):
    callback = hvd.callbacks.WarmupPerturbation(**{**NOISE, "root_rank": ROOT, "verbose": 0} | options)
    callback.set_model(model)
    callback.on_train_begin()
    return callback


def _run_modes(hvd):
    found = {}
    for mode, options in MODES.items():
        model = _model(hvd.rank())
        # Every rank offers another probe; the root's is asked.
        probe = (X, Y) if hvd.rank() == ROOT else (X + 1, Y)
        callback = _begin(hvd, model, probe=probe, **options)
        found[mode] = {
            "kernel": model.layers[0].kernel.numpy(),
            "bias": model.layers[0].bias.numpy(),
            "rate": float(model.optimizer.learning_rate),
            "scores": callback.scores,
            "chosen": callback.chosen,
            "apart": hvd.largest_difference(model.variables),
        }
    return found


def _alone(mode, size):
    """One process, NumPy: the kernel in the end, scores and choices of each round."""
    kernel, all_scores, all_chosen = _kernel(ROOT), [], []
    for turn in range(MODES[mode].get("rounds", 1)):
        noise = Perturbation(**NOISE)
        candidates = [noise.candidate({0: kernel}, turn=turn, rank=rank)[0] for rank in range(size)]
        candidates[ROOT] = kernel
        scores = [np.mean((X @ candidate.astype("float64") + ROOT - Y) ** 2) for candidate in candidates]
        chosen = {"best": int(np.argmin(scores)), "average": None, "root": ROOT}[mode]
        if chosen is None:
            kernel = np.average(candidates, 0, np.exp(-np.array(scores))).astype("float32")
        else:
            kernel = candidates[chosen]
        all_scores.append(scores)
        all_chosen.append(chosen)
    return kernel, all_scores, all_chosen


def _check_modes(ranks):
    for mode in MODES:
        kernel, scores, chosen = _alone(mode, len(ranks))
        for rank in ranks:
            found = rank[mode]
            assert found["chosen"] == chosen
            np.testing.assert_allclose(found["scores"], scores, rtol=1e-5)
            np.testing.assert_allclose(
                found["kernel"], kernel, rtol=0, atol=0 if chosen[0] is not None else 1e-6
            )
            assert found["bias"] == [ROOT]  # no deviation, no noise
            np.testing.assert_allclose(found["rate"], 0.1 * (ROOT + 1), rtol=1e-6)
            assert found["apart"] == 0.0
            assert found == ranks[0][mode]
    assert set(ranks[0]["best"]["chosen"]) != {ROOT}


def _run_refusals(hvd):
    def score(model):
        if hvd.rank() == 1:
            raise ArithmeticError("no quotient")
        return 0.0

    def not_finite(model):
        return float("nan")

    broken = _model(hvd.rank())
    if hvd.rank() == 1:
        broken.layers[0].kernel.assign(np.full((3, 1), np.inf))
    return [
        _error(lambda: _begin(hvd, _model(hvd.rank()), unify="best", score=score)),
        _error(lambda: _begin(hvd, _model(hvd.rank()), unify="best", score=not_finite)),
        _error(lambda: _begin(hvd, _model(hvd.rank()), seed=hvd.rank() % 2)),
        _error(lambda: _begin(hvd, broken)),
    ]


def _error(action):
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _check_refusals(ranks):
    assert all(rank == ranks[0] for rank in ranks)
    failing, unscored, disagreeing, broken = ranks[0]
    assert failing == "RuntimeError: The model could not be scored:\n  rank 1: ArithmeticError: no quotient"
    assert "no candidate has a finite score: rank 0: nan; rank 1: nan" in unscored
    assert "\n  seed: rank" in disagreeing
    assert broken.splitlines()[1:] == ["  rank 1: linear/out/kernel"]


PROGRAMS = {
    "warm-up": Program(_run_modes, _check_modes, sizes=(2, 4)),
    "warm-up, refused": Program(_run_refusals, _check_refusals, sizes=(2,)),
}
