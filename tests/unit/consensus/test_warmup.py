"""The warm-up, with threads as ranks; one process and NumPy say what must come out."""

import math
import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.consensus import warmup
from hvdext.consensus.perturbation import Perturbation, best, deviation, quality
from hvdext.testing import run_ranks

# -- the noise -------------------------------------------------------------------------------------------

LARGE = np.random.default_rng(0).normal(1.0, 2.0, size=(400, 500)).astype("float32")


def _noisy(value, turn=0, rank=1, place=0, **options):
    return Perturbation(**options).candidate({place: value}, turn=turn, rank=rank)[place]


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    [(10, 0.3, 3), (10, 1.0, 10), (10, 0.24, 2), (10, 0.25, 3), (10, 0.001, 1), (30, 0.1, 3), (7, 0.999, 7)],
)
def test_exactly_the_fraction_of_the_elements_changes(size, fraction, count):
    value = np.arange(size, dtype="float32")
    changed = _noisy(value, fraction=fraction, scale=1.0) != value
    assert np.sum(changed) == count


@pytest.mark.parametrize(
    ("distribution", "kurtosis", "largest"), [("normal", 3.0, math.inf), ("uniform", 1.8, math.sqrt(3))]
)
def test_noise_has_its_distribution(distribution, kurtosis, largest):
    noise = (
        _noisy(LARGE, fraction=0.5, scale=0.25, distribution=distribution).astype("float64") - LARGE
    ).ravel()
    noise = noise[noise != 0] / (0.25 * np.std(LARGE))
    assert noise.size == 100_000
    assert abs(np.mean(noise)) < 0.01
    assert abs(np.std(noise) - 1) < 0.01
    assert abs(np.mean(noise**4) - kurtosis) < 0.1
    assert np.max(np.abs(noise)) < largest + 1e-5


def test_the_changed_elements_lie_everywhere():
    changed = _noisy(LARGE, fraction=0.5) != LARGE
    assert np.all(np.abs(np.mean(changed, axis=0) - 0.5) < 0.15)
    assert np.all(np.abs(np.mean(changed, axis=1) - 0.5) < 0.15)


def test_noise_follows_from_seed_round_rank_and_place_alone():
    value = LARGE[0]
    same = _noisy(value)
    np.random.seed(7)
    random.seed(7)
    before = np.random.get_state()[1].tolist(), random.getstate()
    np.testing.assert_array_equal(_noisy(value), same)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    for change in ({"seed": 1}, {"turn": 1}, {"rank": 2}, {"place": 1}):
        assert np.any(_noisy(value, **change) != same)
    # What else is perturbed makes no difference.
    among = Perturbation().candidate({3: LARGE[1], 0: value}, turn=0, rank=1)
    np.testing.assert_array_equal(among[0], same)


@pytest.mark.parametrize("value", [np.zeros(5), np.full((2, 3), 0.1), np.float64(3.0)], ids=str)
def test_a_tensor_without_deviation_stays(value):
    value = np.asarray(value)
    assert deviation(value) == 0
    np.testing.assert_array_equal(_noisy(value, fraction=1.0), value)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_noise_keeps_the_dtype(dtype):
    value = tf.cast(LARGE[0], dtype).numpy()
    noisy = _noisy(value, fraction=1.0, scale=0.5)
    assert noisy.dtype == value.dtype
    difference = noisy.astype("float64") - value.astype("float64")
    assert abs(np.std(difference) / np.std(LARGE[0]) - 0.5) < 0.05


def test_best_is_the_lowest_finite_score():
    assert best([2.0, 1.0, 1.0]) == 1
    assert best([math.nan, 3.0, -math.inf, 2.0]) == 3
    assert best([math.nan, math.inf]) is None


def test_quality_is_the_softmax_of_the_negative_scores():
    np.testing.assert_allclose(quality([0.0, math.log(2)]), [2 / 3, 1 / 3], rtol=1e-15)
    np.testing.assert_allclose(quality([5000.0, math.nan, 5000.0 + math.log(3)]), [0.75, 0, 0.25], rtol=1e-9)
    with pytest.raises(ValueError):
        quality([math.nan, math.inf])


# -- the callback on ranks: one run of three ranks for what makes a case each --------------------------

X = np.random.default_rng(1).normal(size=(6, 3)).astype("float32")
Y = np.sin(X[:, :1] * 2)
NOISE = {"fraction": 0.5, "scale": 0.8, "seed": 5, "verbose": 0}
PURE = Perturbation(0.5, 0.8, seed=5)
PROBE = {"probe": (X, Y)}
SIZE = 3


def make_model(rank):
    """Other weights, statistics and optimizer state on every rank."""
    init = keras.initializers.RandomNormal(stddev=1.0, seed=rank + 1)
    layers = [
        keras.layers.Dense(5, "tanh", kernel_initializer=init, name="hidden"),
        keras.layers.BatchNormalization(name="normalised"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(1, kernel_initializer=init, bias_initializer=init, name="out"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    model.get_layer("normalised").moving_mean.assign(np.full(5, rank / 4))
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"], jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.variables[-1].assign([rank + 0.5])
    return model


def make_small(rank, width=2, optimizer=None):
    init = keras.initializers.RandomNormal(stddev=1.0, seed=rank + 1)
    layers = [
        keras.layers.Dense(width, kernel_initializer=init, name="hidden"),
        keras.layers.Dense(1, kernel_initializer=init, name="out"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers], name="small")
    model.compile(optimizer or keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    return model


def begin(callback, model):
    callback.set_model(model)
    callback.on_train_begin()
    return callback


def warmed_up(model, **options):
    callback = begin(hvd.callbacks.WarmupPerturbation(**{**NOISE, **options}), model)
    everything = [*model.variables, *model.optimizer.variables]
    return {
        "weights": numbers(model.trainable_variables),
        "state": numbers(v for v in everything if not v.path.endswith("seed_generator_state")),
        "scores": callback.scores,
        "chosen": callback.chosen,
        "shares": callback.weights,
    }


def numbers(variables):
    return [variable.numpy() for variable in variables]


def start_of(rank, make=make_model):
    return dict(enumerate(numbers(make(rank).trainable_variables)))


def assert_equal(values, expected):
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


def loss_of(weights, mean, x=X, y=Y, sample_weights=1.0):
    """The model's mean squared error in NumPy, without dropout; weights in Keras' order."""
    kernel, bias, gamma, beta, out_kernel, out_bias = (w.astype("float64") for w in weights.values())
    hidden = np.tanh(x @ kernel + bias)
    hidden = (hidden - mean) / np.sqrt(1.001) * gamma + beta
    return np.mean(sample_weights * (hidden @ out_kernel + out_bias - y)[:, 0] ** 2)


def alone(root, rounds, unify, weight_by=None, places=range(6)):
    """What one process that tries every rank's candidate holds in the end."""
    weights = start_of(root)
    all_scores, all_chosen = [], []
    for turn in range(rounds):
        selected = {place: weights[place] for place in places}
        candidates = [weights | PURE.candidate(selected, turn=turn, rank=rank) for rank in range(SIZE)]
        candidates[root] = weights
        scores = [loss_of(candidate, root / 4) for candidate in candidates]
        all_scores.append(scores)
        if unify == "average":
            shares = np.exp(-np.array(scores)) if weight_by else np.ones(SIZE)
            weights = {
                place: np.average([c[place] for c in candidates], 0, shares).astype("float32")
                for place in weights
            }
        else:
            all_chosen.append(int(np.argmin(scores)) if unify == "best" else root)
            weights = candidates[all_chosen[-1]]
    return list(weights.values()), all_scores, all_chosen


MODES = {
    "average": {"unify": "average", "rounds": 2},
    "weighted": {"unify": "average", "weight_by": "score", "rounds": 2},
    "best": {"unify": "best", "rounds": 3},
    "root": {"unify": "root", "rounds": 2},
}


RUNS = [*((mode, 1) for mode in MODES), ("best", 0)]


@pytest.fixture(scope="module")
def modes():
    def run(comm):
        return {
            (mode, root): warmed_up(make_model(comm.rank), root_rank=root, **MODES[mode], **PROBE)
            for mode, root in RUNS
        }

    return run_ranks(SIZE, run)


@pytest.mark.parametrize(("mode", "root"), RUNS)
@pytest.mark.slow
def test_ranks_end_as_one_process_would(mode, root, modes):
    ranks = [rank[mode, root] for rank in modes]
    first = ranks[0]
    weights, scores, chosen = alone(root, **MODES[mode])
    for rank in ranks:
        assert [value.tobytes() for value in rank["state"]] == [value.tobytes() for value in first["state"]]
        assert rank["scores"] == first["scores"]
    np.testing.assert_allclose(first["scores"], scores, rtol=1e-5)
    np.testing.assert_allclose(np.sum(first["shares"], axis=1), 1, rtol=1e-12)
    if chosen:
        assert first["chosen"] == chosen
        assert first["shares"] == [[float(rank == c) for rank in range(SIZE)] for c in chosen]
        assert_equal(first["weights"], weights)
    else:
        assert first["chosen"] == [None, None]
        for value, wanted in zip(first["weights"], weights, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6)
    if mode == "root":
        assert_equal(first["weights"], start_of(root).values())
    else:
        assert np.any(first["weights"][0] != start_of(root)[0])
    # The root's statistics and optimizer state.
    assert first["state"][-1] == [root + 0.5]
    assert any(np.array_equal(value, np.full(5, root / 4, "float32")) for value in first["state"])


@pytest.mark.parametrize("root", [0, 1])
def test_the_best_score_never_gets_worse(root, modes):
    best_scores = [min(scores) for scores in modes[0]["best", root]["scores"]]
    assert best_scores == sorted(best_scores, reverse=True)
    assert set(modes[0]["best", root]["chosen"]) != {root}


def test_what_no_rank_perturbs_stays_bit_for_bit():
    """Three thirds of a number are not always the number."""
    model = run_ranks(SIZE, lambda comm: warmed_up(make_small(comm.rank, 40), fraction=0.2))[0]
    start = start_of(0, lambda rank: make_small(rank, 40))
    noise = Perturbation(0.2, 0.8, seed=5)
    candidates = [noise.candidate(start, turn=0, rank=rank) for rank in (1, 2)]
    for place, first in start.items():
        stays = np.all([candidate[place] == first for candidate in candidates], axis=0)
        assert_equal(model["weights"][place][stays], first[stays])
        assert np.all(model["weights"][place][~stays] != first[~stays])
    assert model["scores"] == []  # nobody asked


@pytest.fixture(scope="module")
def ranks():
    """Each rank's results of what only needs some ranks."""

    def run(comm):
        def changing(model):
            seen.append(model.get_layer("normalised").moving_mean.numpy())
            for variable in [*model.variables, *model.optimizer.variables]:
                variable.assign(variable + tf.ones_like(variable))
            return [3, 1, 2][comm.rank]

        seen = []
        not_finite = {"score": lambda model: [math.nan, 2.0, -math.inf][comm.rank]}
        own = (X + comm.rank, Y - comm.rank, np.arange(6.0) + comm.rank)
        found = {
            "selected": warmed_up(
                make_model(comm.rank), unify="best", rounds=2, select="net/hidden/*", **PROBE
            ),
            "own probes": warmed_up(make_model(comm.rank), unify="root", probe=own, root_rank=1),
            "changing": warmed_up(make_model(comm.rank), unify="best", rounds=2, score=changing),
            "best": warmed_up(make_small(comm.rank), unify="best", **not_finite),
            "weighted": warmed_up(make_small(comm.rank), weight_by="score", **not_finite),
            "root": warmed_up(make_small(comm.rank), unify="root", **not_finite),
        }
        return found | {"seen": seen}

    return run_ranks(SIZE, run)


@pytest.mark.slow
def test_only_what_is_selected_changes(ranks):
    weights, scores, chosen = alone(0, 2, "best", places=[0, 1])
    for rank in ranks:
        np.testing.assert_allclose(rank["selected"]["scores"], scores, rtol=1e-5)
        assert rank["selected"]["chosen"] == chosen
        assert_equal(rank["selected"]["weights"], weights)


def test_every_rank_is_asked_with_the_roots_probe(ranks):
    start = start_of(1)
    candidates = [PURE.candidate(start, turn=0, rank=rank) for rank in range(SIZE)]
    candidates[1] = start
    scores = [loss_of(candidate, 0.25, X + 1, Y - 1, np.arange(6.0) + 1) for candidate in candidates]
    for rank in ranks:
        np.testing.assert_allclose(rank["own probes"]["scores"], [scores], rtol=1e-5)


def test_what_a_score_of_ones_own_changes_is_undone(ranks):
    weights = start_of(0)
    for turn in range(2):
        weights = PURE.candidate(weights, turn=turn, rank=1)
    for rank in ranks:
        assert rank["changing"]["scores"] == [[3.0, 1.0, 2.0]] * 2
        assert rank["changing"]["chosen"] == [1, 1]
        np.testing.assert_array_equal(rank["seen"], np.zeros((2, 5)))
        assert_equal(rank["changing"]["weights"], weights.values())
        assert rank["changing"]["state"][-1] == [0.5]
        assert_equal(rank["changing"]["state"], ranks[0]["changing"]["state"])


def test_scores_that_are_not_finite_never_win(ranks):
    only = PURE.candidate(start_of(0, make_small), turn=0, rank=1)
    for rank in ranks:
        assert rank["best"]["chosen"] == [1]
        assert_equal(rank["best"]["weights"], only.values())
        assert rank["weighted"]["shares"] == [[0.0, 1.0, 0.0]]
        for value, wanted in zip(rank["weighted"]["weights"], only.values(), strict=True):
            np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6)
        assert rank["root"]["chosen"] == [0]
        assert math.isnan(rank["root"]["scores"][0][0])  # told all the same


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_dtypes(dtype):
    def run(comm):
        found = []
        for unify in ("average", "best"):
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, dtype=dtype)])
            model.layers[0].kernel.assign(start)
            score = {"score": lambda model: -comm.rank}
            begin(hvd.callbacks.WarmupPerturbation(**NOISE, unify=unify, **score), model)  # not compiled
            found.append(model.layers[0].kernel.numpy())
        return found

    start = tf.cast(X[:3] @ np.ones((3, 4)) + np.arange(4), dtype).numpy()
    mine, theirs = run_ranks(2, run)
    assert_equal(mine, theirs)
    candidate = PURE.candidate({0: start}, turn=0, rank=1)[0]
    assert_equal(mine[1:], [candidate])
    wide = candidate.astype("float64") / 2 + start.astype("float64") / 2
    tolerance = {"float16": 2**-11, "bfloat16": 2**-8, "float64": 2**-52}[dtype]
    assert mine[0].dtype == start.dtype
    np.testing.assert_allclose(mine[0].astype("float64"), wide, rtol=tolerance * 1.01)


def test_global_generators_are_not_touched():
    def run(comm):
        model = models[comm.rank]
        own = [v for v in model.variables if v.path.endswith("seed_generator_state")]
        drawn = numbers(own)
        callback = begin(hvd.callbacks.WarmupPerturbation(**NOISE, unify="best", **PROBE), model)
        assert len(own) == len(callback.chosen) == 1
        assert_equal(numbers(own), drawn)
        assert model.metrics[0].result() == 0  # training's loss starts anew

    models = [make_model(rank) for rank in range(2)]
    before = np.random.get_state()[1].tolist(), random.getstate()
    run_ranks(2, run)
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before


# -- when it runs ----------------------------------------------------------------------------------------


def test_alone():
    (found,) = run_ranks(1, lambda comm: warmed_up(make_model(0), unify="best", rounds=2, **PROBE))
    start = start_of(0)
    assert_equal(found["weights"], start.values())
    np.testing.assert_allclose(found["scores"], [[loss_of(start, 0.0)]] * 2, rtol=1e-5)
    assert found["chosen"] == [0, 0]


@pytest.mark.slow
def test_in_fit_once_for_a_model_from_scratch():
    def run(comm):
        model = make_small(comm.rank)
        first, other = (hvd.callbacks.WarmupPerturbation(**NOISE) for _ in range(2))
        every = hvd.callbacks.WarmupPerturbation(**NOISE, every_fit=True)
        found = []
        for callback in (first, first, other, every):
            model.fit(X, Y, 6, verbose=0, callbacks=[callback])
            found.append((len(callback.chosen), model.get_weights()[0]))
        model.optimizer.iterations.assign(0)  # as after a fit without a step
        first.chosen = []
        begin(first, model)
        return found, first.chosen, begin(first, make_small(comm.rank)).chosen

    (found, same_model, other_model), _ = run_ranks(2, run)
    assert [count for count, _ in found] == [1, 1, 0, 1]
    first, second, third, fourth = (weights for _, weights in found)
    assert_equal([second, third], [first, first])
    assert np.any(fourth != first)
    assert (same_model, other_model) == ([], [None])


@pytest.mark.parametrize("kind", ["loss scale", "multi"])
def test_a_resumed_fit_is_left_alone(kind):
    def run(comm):
        member = keras.optimizers.SGD()
        wrapped = {
            "loss scale": lambda: keras.optimizers.LossScaleOptimizer(member),
            "multi": lambda: keras.optimizers.MultiOptimizer(lambda variable: member),
        }
        model = make_small(comm.rank, optimizer=wrapped[kind]())
        model.optimizer.build(model.trainable_variables)
        member.iterations.assign(3)
        before = model.get_weights()
        callback = begin(hvd.callbacks.WarmupPerturbation(**NOISE), model)
        return callback.chosen, all(map(np.array_equal, before, model.get_weights()))

    assert run_ranks(2, run) == [([], True)] * 2


def test_rank_0_reports(capsys):
    def run(comm):
        for options in ({"unify": "best", "rounds": 2}, {"weight_by": "score"}, {"verbose": 0}):
            scores = {"score": lambda model: 0.5 * comm.rank}
            warmed_up(make_small(comm.rank), **{"verbose": 1, **scores, **options})
        warmed_up(make_small(comm.rank), verbose=1)

    run_ranks(2, run)
    assert capsys.readouterr().out.splitlines() == [
        "Warm-up, round 1 of 2: scores by rank 0, 0.5; all take rank 0's weights",
        "Warm-up, round 2 of 2: scores by rank 0, 0.5; all take rank 0's weights",
        "Warm-up, round 1 of 1: scores by rank 0, 0.5; all take the mean, the ranks weighing 0.6225, 0.3775",
        "Warm-up, round 1 of 1: all take the mean, the ranks weighing 0.5, 0.5",
    ]


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "`fraction` must lie in (0, 1]. Received: fraction=0."),
        ({"fraction": 1.5}, "`fraction` must lie in (0, 1]. Received: fraction=1.5."),
        ({"fraction": True}, "`fraction` must lie in (0, 1]. Received: fraction=True."),
        ({"scale": 0.0}, "`scale` must be a number above 0. Received: scale=0.0."),
        ({"scale": math.inf}, "`scale` must be a number above 0. Received: scale=inf."),
        ({"scale": math.nan}, "`scale` must be a number above 0. Received: scale=nan."),
        ({"distribution": "gauss"}, "`distribution` must be one of 'normal', 'uniform'. Received: dist"),
        ({"seed": -1}, "`seed` must be an integer of at least 0. Received: seed=-1."),
        ({"seed": 0.5}, "`seed` must be an integer of at least 0. Received: seed=0.5."),
        ({"unify": "mean"}, "`unify` must be one of 'average', 'best', 'root'. Received: unify='mean'."),
        ({"unify": "best"}, "`probe` (or `score`) must be given with unify='best'. Received: probe=None."),
        ({"weight_by": "score"}, "`probe` (or `score`) must be given with weight_by='score'."),
        ({"weight_by": "loss"}, "`weight_by` must be one of None, 'score'. Received: weight_by='loss'."),
        ({"weight_by": "score", "unify": "root", **PROBE}, "`weight_by` needs unify='average'. Received: w"),
        ({"probe": X}, "`probe` must be a batch: (inputs, targets)"),
        ({"score": len, **PROBE}, "`probe` must be left out where `score` is given. Received: both."),
        ({"score": 3}, "`score` must be a function of a model. Received: score=3."),
        ({"rounds": 0}, "`rounds` must be an integer of at least 1. Received: rounds=0."),
        ({"root_rank": -1}, "`root_rank` must be an integer of at least 0. Received: root_rank=-1."),
        ({"select": []}, "`select` must hold at least one pattern. Received: []."),
        ({"scales": 1}, "`hvd.callbacks.WarmupPerturbation` has no argument `scales`. Did you mean `scale`?"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        hvd.callbacks.WarmupPerturbation(**options)
    assert str(caught.value).startswith(message)


def _fails(variable):
    raise KeyError("no such layer")


def _small(change=lambda model, rank: None, **options):
    """A program: a small model with something wrong, or with wrong options; functions are asked by rank."""

    def make(rank):
        model = make_small(rank)
        change(model, rank)
        return model, {key: value(rank) if callable(value) else value for key, value in options.items()}

    return make


def _resumed(model, rank):
    model.optimizer.iterations.assign(rank)


def _not_finite(model, rank):
    if rank == 2:
        model.get_layer("out").kernel.assign(np.float32([[1], [np.nan]]))


def _not_scoring(rank):
    def score(model):
        if rank == 1:
            raise ArithmeticError("no quotient")
        return 1.0 if rank == 0 else "good"

    return lambda rank: score


class NoLoss(keras.Model):
    def test_step(self, data):
        return {"fid": 1.0}


def _without_loss(rank):
    inputs = keras.Input((3,))
    return NoLoss(inputs, keras.layers.Dense(1, name="out")(inputs)), PROBE


def _unbuilt(rank):
    return keras.Sequential([*[keras.Input((2,))] * (rank == 0), keras.layers.Dense(3)], name="model"), {}


_DISAGREE = "The ranks disagree about hvd.callbacks.WarmupPerturbation:\n  "
_BY_RANK = {
    "fraction": [0.5, 0.25, 0.5],
    "scale": [0.5, 0.25, 0.5],
    "distribution": ["normal", "uniform", "normal"],
    "seed": [0, 1, 0],
    "unify": ["root", "average", "root"],
    "rounds": [1, 2, 1],
    "root_rank": [0, 1, 0],
}
REFUSED = {
    name: (
        _small(**{name: values.__getitem__}),
        f"{_DISAGREE}{name}: ranks 0, 2: {values[0]!r}; rank 1: {values[1]!r}",
    )
    for name, values in _BY_RANK.items()
} | {
    "weight_by": (
        _small(**PROBE, weight_by=[None, None, "score"].__getitem__),
        _DISAGREE + "weight_by: ranks 0, 1: None; rank 2: 'score'",
    ),
    "select": (
        _small(select=["*", "*/kernel", "*"].__getitem__),
        _DISAGREE + "selected, by place: ranks 0, 2: [0, 1, 2, 3]; rank 1: [0, 2]",
    ),
    "probe": (
        _small(probe=[None, (X, Y), None].__getitem__),
        _DISAGREE + "probe is given: ranks 0, 2: False; rank 1: True",
    ),
    "score": (
        _small(score=[None, lambda rank: len, None].__getitem__),
        _DISAGREE + "score is given: ranks 0, 2: False; rank 1: True",
    ),
    "every_fit": (
        _small(lambda model, rank: model.optimizer.iterations.assign(3), every_fit=lambda rank: rank == 1),
        _DISAGREE + "whether to do nothing",
    ),
    "one resumed rank": (_small(_resumed), _DISAGREE + "whether to do nothing"),
    "models": (
        lambda rank: (make_small(rank, 2 + rank), {}),
        _DISAGREE + "trainable variables: rank 0: ['(3, 2) float32'",
    ),
    "an unbuilt model on some ranks": (
        _unbuilt,
        "ranks 1, 2: `WarmupPerturbation` needs a built model, whose weights exist when training begins",
    ),
    "no such root": (
        _small(root_rank=3),
        "`root_rank` must be one of the ranks [0, 1, 2]. Received: root_rank=3.",
    ),
    "pattern": (
        _small(select="decoder/*"),
        "`select` must match at least one trainable variable. Received: 'decoder/*'",
    ),
    "predicate": (_small(select=lambda rank: _fails), "`select` has failed: KeyError: 'no such layer'"),
    "zeros": (_small(select="*/bias"), "`select` must match at least one variable whose elements differ"),
    "weights that are not finite": (
        _small(_not_finite),
        "hvd.callbacks.WarmupPerturbation needs finite weights. These are not:\n  rank 2: small/out/kernel",
    ),
    "candidates that are not finite": (
        _small(scale=1e39),
        "hvd.callbacks.WarmupPerturbation needs finite weights. These are not:\n  rank 1: small/",
    ),
    "a score that fails": (
        lambda rank: (make_small(rank), {"unify": "root", "score": _not_scoring(rank)(rank)}),
        "The model could not be scored:\n  rank 1: ArithmeticError: no quotient\n"
        "  rank 2: could not convert string to float",
    ),
    "a probe that does not fit": (
        _small(unify="best", probe=(X[:, :2], Y)),
        "The model could not be scored:\n  ranks 0, 1, 2: ",
    ),
    "a model without loss": (
        _without_loss,
        "  ranks 0, 1, 2: `score` must be given instead of `probe` for a model whose `test_step` returns no "
        "'loss'. Received: ['fid'].",
    ),
    "no finite score, best": (
        lambda rank: (
            make_small(rank),
            {"unify": "best", "score": lambda model: [math.nan, math.inf, -math.inf][rank]},
        ),
        "no candidate has a finite score: rank 0: nan; rank 1: inf; rank 2: -inf.",
    ),
    "no finite score, weighted": (
        lambda rank: (make_small(rank), {"weight_by": "score", "score": lambda model: math.nan}),
        "no candidate has a finite score: rank 0: nan; rank 1: nan; rank 2: nan.",
    ),
}


def refusal(make, rank):
    model, options = make(rank)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        begin(hvd.callbacks.WarmupPerturbation(**{**NOISE, **options}), model)
    return caught.value


@pytest.fixture(scope="module")
def refusals():
    return run_ranks(
        SIZE, lambda comm: {name: refusal(make, comm.rank) for name, (make, _) in REFUSED.items()}
    )


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.slow
def test_the_same_refusal_on_every_rank(name, refusals):
    errors = [rank[name] for rank in refusals]
    assert len({(type(error), str(error)) for error in errors}) == 1
    assert REFUSED[name][1] in str(errors[0])
    if name in _BY_RANK:
        assert len(str(errors[0]).splitlines()) == 2  # nothing else is said to differ


def test_the_rank_that_cannot_score_keeps_its_own_error(refusals):
    causes = [type(rank["a score that fails"].__cause__) for rank in refusals]
    assert causes == [type(None), ArithmeticError, ValueError]


@pytest.mark.parametrize("name", ["no such root", "pattern", "predicate", "zeros", "no finite score, best"])
def test_refusals_alone(name):
    (error,) = run_ranks(1, lambda comm: refusal(REFUSED[name][0], 0))
    expected = REFUSED[name][1].replace("[0, 1, 2]", "[0]").replace("; rank 1: inf; rank 2: -inf", "")
    assert expected in str(error)


def test_ranks_that_end_apart_are_noticed(monkeypatch):
    mean = warmup._mean

    def almost(comm, *arguments):
        unified = mean(comm, *arguments)
        if comm.rank == 1:
            unified[0] = np.nextafter(unified[0], np.float32(9))
        return unified

    monkeypatch.setattr(warmup, "_mean", almost)
    errors = run_ranks(2, lambda comm: str(refusal(_small(), comm.rank)))
    assert errors[0] == errors[1]
    assert "The ranks hold different weights where they must be equal" in errors[0]


def test_before_init():
    with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
        begin(hvd.callbacks.WarmupPerturbation(), make_small(0))
