"""Parameter sync as users meet it: in `fit`, saved and resumed, refused, stopped."""

import threading

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.sync.engine.report import FINISHED
from hvdext.testing import run_ranks

SIZES = [2, 4]


def small_model(seed=0, norm=False):
    layers = [keras.Input((3,)), keras.layers.Dense(4, activation="tanh", name="hidden")]
    layers += [keras.layers.BatchNormalization(name="norm")] if norm else []
    model = keras.Sequential([*layers, keras.layers.Dense(1, name="out")], name="small")
    generator = np.random.default_rng(seed)
    model.set_weights([generator.normal(scale=0.5, size=w.shape) for w in model.get_weights()])
    return model


def data(rows=32):
    generator = np.random.default_rng(7)
    x = generator.normal(size=(rows, 3)).astype("float32")
    return x, np.tanh(x.sum(axis=1, keepdims=True)).astype("float32")


def share(arrays, rank, size, batch):
    """Batch b of rank r: rows of the global batch b."""
    rows = [
        slice(b * batch * size + rank * batch, b * batch * size + (rank + 1) * batch)
        for b in range(len(arrays[0]) // (batch * size))
    ]
    return [np.concatenate([array[r] for r in rows]) for array in arrays]


def fit(model, arrays, sync, batch, optimizer=None, epochs=2, **options):
    model.compile(optimizer or keras.optimizers.SGD(0.1), "mse", jit_compile=False, **options)
    model.fit(*arrays, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, callbacks=sync)
    return model.get_weights()


def fit_alone(model, arrays, batch, optimizer=None, **options):
    return fit(model, arrays, [], batch, optimizer, **options)


def saved(model, file):
    """What `model`'s syncs have put into its checkpoint, by name; `file` is written on the way."""
    model.save_weights(file)
    return read(file)


def read(file):
    """What the syncs of a model have put into a checkpoint, by name."""
    found = {}

    def look(path, item):
        if "hvdext_sync" in path and isinstance(item, h5py.Dataset):
            found[path.rsplit("/", 1)[-1]] = item[()]

    with h5py.File(file) as opened:
        opened.visititems(look)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps_per_execution", [1, 2])
@pytest.mark.slow
def test_averaging_every_step_with_sgd_is_synchronous_sgd(size, steps_per_execution):
    """With two steps per call, weights are averaged every second one: two local steps of plain SGD."""
    together = fit_alone(small_model(), data(), 8)

    def rank(comm):
        sync = hvd.sync.LocalSGD(every=1)
        mine = share(data(), comm.rank, size, 8 // size)
        return fit(small_model(), mine, [sync], 8 // size, steps_per_execution=steps_per_execution)

    ranks = run_ranks(size, rank)
    for found in ranks:
        for a, b, first in zip(found, together, ranks[0], strict=True):
            np.testing.assert_array_equal(a, first)
            if steps_per_execution == 1:
                np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: s.LocalSGD(3),
        lambda s: s.LocalSGD(3, wire="int8"),
        lambda s: s.PartialSync(s.Rotating(2), 4, delay=2),
        lambda s: s.LocalSGD(2, whom=s.Ring()),
        lambda s: s.AsyncGossip(whom=s.Exponential()),
        lambda s: s.ParameterSync(s.EveryEpoch()),
        lambda s: s.ParameterSync(s.AtEnd()),
    ],
)
@pytest.mark.slow
def test_one_rank_equals_plain_training(make):
    plain = fit_alone(small_model(), data(), 8, keras.optimizers.Adam(0.01))
    with use(SoloComm()):
        found = fit(small_model(), data(), [make(hvd.sync)], 8, keras.optimizers.Adam(0.01))
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-7)


def test_float64_models_are_averaged_in_float64():
    def rank(comm):
        variable = keras.Variable([1 / 3 + comm.rank * 1e-9], dtype="float64", name="x")
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, dtype="float64")])
        model.variables[0].assign(np.array([[1 / 3 + comm.rank * 1e-9]]))
        sync = hvd.sync.LocalSGD(1)
        sync.begin(model)
        sync.step()
        del variable
        return model.get_weights()[0].item()

    assert run_ranks(2, rank) == pytest.approx([1 / 3 + 0.5e-9] * 2, abs=1e-14)


@pytest.mark.parametrize("when", ["EveryEpoch", "AtEnd"])
@pytest.mark.slow
def test_epoch_and_end(when):
    """Ranks whose learning rate is 0 keep their own weights until they are averaged."""

    def rank(comm):
        model = small_model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        seen = []
        look = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: seen.append(model.get_weights()[0][0, 0])
        )
        sync = hvd.sync.ParameterSync(getattr(hvd.sync, when)())
        fit(model, data(8), [sync, look], 4, keras.optimizers.SGD(0.0))
        return [
            value - small_model().get_weights()[0][0, 0] for value in [*seen, model.get_weights()[0][0, 0]]
        ]

    middle = 0.5 if when == "EveryEpoch" else None
    for number, found in enumerate(run_ranks(2, rank)):
        expected = [number, number if middle is None else middle, 0.5]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_batch_norm_statistics_are_averaged_and_slots_on_request():
    def rank(comm, slots):
        model = small_model(norm=True)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        sync = hvd.sync.LocalSGD(4, what=hvd.sync.All(slots=slots))
        x, y = data()
        fit(model, (x * (1 + comm.rank), y), [sync], 8, optimizer, epochs=1)
        slot = next(v for v in optimizer.variables if "momentum" in v.path)
        return [v.numpy() for v in model.variables], slot.numpy()

    for slots in (False, True):
        (a, slot_a), (b, slot_b) = run_ranks(2, rank, slots)
        for mine, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(mine, other)
        assert np.array_equal(slot_a, slot_b) == slots


def test_adaptive_interval_by_divergence_follows_its_rule():
    """Ranks at -h and +h around 10: divergence h / 10; H <- H * target / measured within a factor of 2."""

    def rank(comm):
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
        sync = hvd.sync.ParameterSync(hvd.sync.Adaptive(2, 9, divergence=0.05))
        model.variables[0].assign([[10.0]])
        sync.begin(model)
        intervals = []
        for _ in range(24):
            model.variables[0].assign_add([[0.1 if comm.rank else -0.1]])
            sync.step()
            intervals.append(sync.interval)
        return intervals

    # Exchanges at 2 (measured 0.02, H 2 -> 4), 6 (0.04, 4 -> 5), 11 (0.05), 16, 21.
    expected = [2] + [4] * 4 + [5] * 19
    assert run_ranks(2, rank) == [expected, expected]


def test_adaptive_interval_by_overhead_is_the_same_on_all_ranks():
    when = hvd.sync.Adaptive(1, 64, overhead=0.01)
    assert when.next_interval(8, 0.02) == 16
    assert when.next_interval(8, 0.015) == 12
    assert when.next_interval(8, 0.0) == 4
    assert when.next_interval(64, 1.0) == 64

    def rank(comm):
        model = small_model()
        sync = hvd.sync.ParameterSync(when)
        sync.begin(model)
        intervals = []
        for _ in range(20):
            sync.step()
            intervals.append(sync.interval)
        return intervals

    first, second = run_ranks(2, rank)
    assert first == second
    assert max(first) > 1  # exchanging at every step takes more than 1 % of nothing


# -- asynchronous ---------------------------------------------------------------------------------------


def test_always_never_blocks_training():
    """Rank 0 trains 50 steps while rank 1 is held up between its first exchange and the second."""
    is_held, steps_done = threading.Event(), threading.Event()

    def hold(exchanged):
        is_held.set()
        steps_done.wait(60)

    def rank(comm):
        model = small_model()
        model.compile(keras.optimizers.SGD(0.0), "mse")
        sync = hvd.sync.AsyncGossip()
        if comm.rank == 1:
            sync.listen(hold)
        sync.begin(model)
        assert is_held.wait(60)
        for _ in range(50):
            sync.step()
        assert sync.totals.exchanges <= 1
        if comm.rank == 0:
            steps_done.set()
        steps_done.wait(60)
        sync.end()
        return sync.totals.exchanges

    exchanges = run_ranks(2, rank)
    assert exchanges[0] == exchanges[1] >= 1


@pytest.mark.slow
def test_asynchronous_ranks_meet_and_keep_their_sum():
    """No training: pairs average until all are equal; the sum stays what it was."""

    def rank(comm):
        model = small_model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        sync = hvd.sync.AsyncGossip(max_staleness=1)
        sync.begin(model)
        for _ in range(40):
            sync.step()  # waits for one exchange each time
        sync.end()
        return model.get_weights()

    expected = [w + 1.5 for w in small_model().get_weights()]
    for found in run_ranks(4, rank):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.slow
def test_asynchronous_ranks_may_train_different_numbers_of_steps():
    def rank(comm):
        model = small_model()
        model.compile(keras.optimizers.SGD(0.05), "mse", jit_compile=False)
        x, y = data()
        sync = hvd.sync.AsyncGossip()
        model.fit(x, y, batch_size=8, epochs=1 + 3 * comm.rank, verbose=0, callbacks=[sync])
        return sync.steps

    assert run_ranks(2, rank) == [4, 16]


@pytest.mark.parametrize("groups", [[[0], [1]], [[0, 1], [2, 3]]])
@pytest.mark.slow
def test_a_group_that_has_finished_goes_on_exchanging_until_all_have(groups):
    group_has_finished = threading.Event()

    def told(exchanged):
        if len(exchanged.outcome.ranks) == len(groups[0]) and exchanged.outcome.table[:, FINISHED].all():
            group_has_finished.set()

    def rank(comm):
        whom = hvd.sync.Hierarchical(groups, every=2)
        sync = hvd.sync.ParameterSync(hvd.sync.Always(), whom=whom)
        sync.listen(told)
        sync.begin(small_model())
        if comm.rank not in groups[0]:
            assert group_has_finished.wait(60)
        sync.end()
        return sync.totals.exchanges

    assert len(set(run_ranks(sum(map(len, groups)), rank))) == 1


def test_one_rank_asks_all_to_stop():
    def rank(comm):
        model = small_model()
        sync = hvd.sync.AsyncGossip(max_staleness=2)
        sync.begin(model)
        steps = 0
        while not sync.stop_requested and steps < 2000:
            sync.step()
            steps += 1
            if comm.rank == 1 and steps == 5:
                sync.request_stop()
        sync.end()
        return steps

    assert all(steps < 2000 for steps in run_ranks(2, rank))


# -- weights that are not finite ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda s, o: s.LocalSGD(1, on_nonfinite=o),
        lambda s, o: s.LocalSGD(2, delay=1, wire="int8", on_nonfinite=o),
    ],
)
@pytest.mark.slow
def test_nonfinite_weights_are_named_or_skipped(make):
    def rank(comm, on_nonfinite):
        model = small_model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        sync = make(hvd.sync, on_nonfinite)
        sync.begin(model)
        if comm.rank == 1:
            kernel = model.layers[1].kernel
            kernel.assign(np.full(kernel.shape, np.nan))
        try:
            for _ in range(4):
                sync.step()
        except ValueError as error:
            return str(error)
        return model.get_weights()

    messages = run_ranks(3, rank, "raise")
    assert len(set(messages)) == 1
    assert "rank 1: small/out/kernel" in messages[0]
    expected = [w + 1 for w in small_model().get_weights()]  # the mean of ranks 0 and 2
    for found in run_ranks(3, rank, "skip_rank"):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=0.02)


def spreading_step(model, amount=0.0):
    """As a step of training would: one NaN, and there is nothing else."""
    total = sum(tf.reduce_sum(tf.convert_to_tensor(v)) for v in model.trainable_variables)
    for variable in model.trainable_variables:
        variable.assign_add(tf.fill(variable.shape, amount + 0 * total))


def is_finite(model):
    return all(np.isfinite(w).all() for w in model.get_weights())


ROTATING = {
    "streaming": lambda s: s.StreamingDiLoCo(
        4, 2, delay=3, alpha=0.5, wire=s.Wire("int8", "error_feedback"), on_nonfinite="skip_rank"
    ),
    "mean": lambda s: s.PartialSync(s.Rotating(2), 4, delay=3, on_nonfinite="skip_rank"),
    "within groups": lambda s: s.PartialSync(
        s.Rotating(2), 2, whom=s.Hierarchical([[0], [1, 2]], 3), on_nonfinite="skip_rank"
    ),
    "asynchronous": lambda s: s.ParameterSync(
        s.Always(max_staleness=1), what=s.Rotating(2), on_nonfinite="skip_rank"
    ),
}


@pytest.mark.parametrize("name", ROTATING)
@pytest.mark.slow
def test_a_rank_takes_all_fragments_at_once(name):
    """One of them would be spoilt by the next step, made with the other."""

    def rank(comm):
        model, sync = small_model(), ROTATING[name](hvd.sync)
        sync.begin(model)
        for step in range(16):
            if step == 3 and comm.rank == 1:
                model.layers[0].bias.assign([np.inf] * 4)
            spreading_step(model, 0.01)
            sync.step()
        found = is_finite(model)
        sync.end()
        return found, is_finite(model)

    with pytest.warns(UserWarning, match="Weights of rank 1 are not finite") as warned:
        assert run_ranks(3, rank) == [(True, True)] * 3
    assert len([w for w in warned if "not finite" in str(w.message)]) == 1


@pytest.mark.slow
def test_a_recovery_leaves_the_other_ranks_as_they_are():
    def rank(comm):
        model = small_model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        if comm.rank == 1:
            model.layers[1].bias.assign([np.nan])
            spreading_step(model)
        sync = hvd.sync.PartialSync(hvd.sync.Rotating(2), 2, on_nonfinite="skip_rank")
        sync.begin(model)
        sync.step()  # fragment 0, "hidden"
        return model.layers[0].bias.numpy()[0], model.layers[1].bias.numpy()[0], comm.traffic()["sync"].bytes

    start = [layer.bias.numpy()[0] for layer in small_model().layers]
    found = run_ranks(3, rank)
    for i, (hidden, out, sent) in enumerate(found):
        assert [hidden, out] == pytest.approx([start[0] + 1, start[1] + i], abs=1e-6)
        assert sent == found[0][2] > 3 * 16 * 4  # two exchanges of "hidden", one of "out"


@pytest.mark.slow
def test_a_recovery_beside_an_exchange_is_resumed(tmp_path):
    """Fragment 0 fails at step 2, all is mended at 5; what left at 4 would bring a difference from before."""

    def prepared(comm):
        model = small_model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        return model, hvd.sync.PartialSync(hvd.sync.Rotating(2), 4, delay=3, on_nonfinite="skip_rank")

    def rank(comm):
        model, sync = prepared(comm)
        sync.begin(model)
        if comm.rank == 1:
            model.layers[0].bias.assign([np.nan] * 4)
        for _ in range(5):
            sync.step()
        model.save_weights(tmp_path / f"{comm.rank}.weights.h5")
        resumed, other = prepared(comm)
        other.attach(resumed)
        resumed.load_weights(tmp_path / f"{comm.rank}.weights.h5")
        other.begin(resumed)
        for one in (sync, other):
            one.step(2)  # fragment 1 lands
        return model.layers[1].bias.numpy()[0], resumed.layers[1].bias.numpy()[0]

    start = small_model().layers[1].bias.numpy()[0]
    # Rank 1 takes the mean as it is, though its values, which count in it, are by now rank 0's.
    assert run_ranks(2, rank) == [(pytest.approx(start + 0.5), pytest.approx(start + 0.5))] * 2


def test_a_group_without_a_finite_rank_waits_for_the_others():
    def rank(comm):
        model = small_model()
        whom = hvd.sync.Hierarchical([[0], [1]], every=2)
        sync = hvd.sync.LocalSGD(1, whom=whom, on_nonfinite="skip_rank")
        sync.begin(model)
        if comm.rank == 1:
            model.layers[1].bias.assign([np.nan])
        found = []
        for _ in range(2):
            sync.step()
            found.append(is_finite(model))
        return found

    assert run_ranks(2, rank) == [[True, True], [False, True]]


def test_a_rank_that_is_skipped_mends_the_optimizer_that_it_trains_with_now():
    def rank(comm):
        model = small_model()
        sync = hvd.sync.LocalSGD(1, on_nonfinite="skip_rank")
        optimizers = [keras.optimizers.SGD(0.1, momentum=0.9) for _ in range(2)]
        for optimizer in optimizers:
            optimizer.build(model.trainable_variables)
            sync.begin(model, optimizer)
        if comm.rank == 1:
            for variable in [model.layers[0].kernel, *(o.momentums[0] for o in optimizers)]:
                variable.assign(np.full(variable.shape, np.nan))
        sync.step()
        return [bool(np.isfinite(o.momentums[0]).all()) for o in optimizers]

    assert run_ranks(2, rank) == [[True, True], [False, True]]


# -- saved and resumed ----------------------------------------------------------------------------------

RESUMED = {
    "DiLoCo": lambda s: s.DiLoCo(6, outer=keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True)),
    "streaming, in flight": lambda s: s.StreamingDiLoCo(8, 2, delay=3, alpha=0.5, wire="int8"),
    "error feedback, Adam outside": lambda s: s.DiLoCo(
        3, outer=keras.optimizers.Adam(0.1), wire=s.Wire("int4", "error_feedback")
    ),
    "by samples, EASGD beside": lambda s: s.EASGD(4),
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(name, tmp_path):
    """Eight steps, saved after the fifth, which is in the middle of a round; new objects go on from there."""

    def step(model, rank, t):
        generator = np.random.default_rng([rank, t])
        x = generator.normal(size=(4, 3)).astype("float32")
        model.train_on_batch(x, x.sum(axis=1, keepdims=True))

    def prepared():
        model = small_model(norm=True)
        model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model, RESUMED[name](hvd.sync)

    def rank(comm):
        model, sync = prepared()
        file = tmp_path / f"{name}{comm.rank}.weights.h5"
        sync.begin(model)
        for t in range(14):
            step(model, comm.rank, t)
            sync.step(samples=4)
            if t == 8:
                model.save_weights(file)
        resumed, sync = prepared()
        sync.attach(resumed)
        resumed.load_weights(file)
        sync.begin(resumed)
        for t in range(9, 14):
            step(resumed, comm.rank, t)
            sync.step(samples=4)
        return model.get_weights(), resumed.get_weights()

    for straight, resumed in run_ranks(2, rank):
        for a, b in zip(straight, resumed, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_model_saved_with_its_sync_opens_without(tmp_path):
    model = small_model()
    with use(SoloComm()):
        fit(model, data(), [hvd.sync.DiLoCo(2)], 8)
    model.save(tmp_path / "model.keras")
    opened = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(opened.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# -- refusals -------------------------------------------------------------------------------------------

REFUSED = {
    "interval": (
        lambda s: s.LocalSGD(0),
        "`every` must be an integer of at least 1. Received: every=0.",
    ),
    "delay": (lambda s: s.Every(4, delay=5), "`delay` must be at most `steps`, 4. Received: delay=5."),
    "alpha of a pull": (lambda s: s.Pull(1.5), "`alpha` must lie in (0, 1]. Received: alpha=1.5."),
    "no pull": (lambda s: s.Pull(0), "`alpha` must lie in (0, 1]. Received: alpha=0."),
    "a pull in words": (lambda s: s.Pull("x"), "`alpha` must lie in (0, 1]. Received: alpha='x'."),
    "a pull by nothing": (lambda s: s.Pull(None), "`alpha` must lie in (0, 1]. Received: alpha=None."),
    "a pull by truth": (lambda s: s.Pull(True), "`alpha` must lie in (0, 1]. Received: alpha=True."),
    "centre by truth": (lambda s: s.Pull(0.5, True), "`centre_rate` must lie in (0, 1]. Received"),
    "alpha of an outer in words": (
        lambda s: s.Outer(keras.optimizers.SGD(), alpha="x"),
        "`alpha` must lie in [0, 1]. Received: alpha='x'.",
    ),
    "alpha of an outer": (
        lambda s: s.Outer(keras.optimizers.SGD(), alpha=-0.1),
        "`alpha` must lie in [0, 1]. Received: alpha=-0.1.",
    ),
    "staleness": (lambda s: s.Always(0), "`max_staleness` must be an integer of at least 1"),
    "adaptive": (lambda s: s.Adaptive(1, 2), "Exactly one of `divergence` and `overhead` must be given"),
    "max": (lambda s: s.Adaptive(4, 2, overhead=0.1), "`max` must be an integer of at least 4"),
    "weights": (lambda s: s.Mean("batches"), "`weight_by` must be one of"),
    "more fragments than steps": (
        lambda s: s.StreamingDiLoCo(2, 3),
        "`steps` must be at least the number of fragments",
    ),
    "centre with peers": (
        lambda s: s.ParameterSync(s.Every(2), whom=s.Ring(), rule=s.Outer(keras.optimizers.SGD())),
        "`rule` must do without values that all ranks have in common",
    ),
    "on_nonfinite": (lambda s: s.LocalSGD(2, on_nonfinite="ignore"), "`on_nonfinite` must be one of"),
    "divergence": (
        lambda s: s.Adaptive(1, 2, divergence="x"),
        "`divergence` must be a number above 0. Received: divergence='x'.",
    ),
    "slow momentum": (lambda s: s.SlowMo(2, beta=None), "`beta` must lie in [0, 1). Received: beta=None."),
    "slow rate": (lambda s: s.SlowMo(2, alpha="x"), "`alpha` must be a number above 0. Received: alpha='x'."),
    "momentum": (lambda s: s.SlowMo(2, beta=1.0), "`beta` must lie in [0, 1). Received: beta=1.0."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused_where_they_are_given(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError) as error:
        make(hvd.sync)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "optimizer", ["sgd", None, keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())]
)
def test_an_outer_optimizer_must_be_one(optimizer):
    with pytest.raises(TypeError, match="`optimizer` must be a plain Keras optimizer"):
        hvd.sync.Outer(optimizer)


class SlowedSGD(keras.optimizers.SGD):
    """Registered nowhere."""

    def __init__(self, learning_rate=0.1, slowness=2.0, **options):
        super().__init__(learning_rate, **options)
        self.slowness = slowness

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate / self.slowness)

    def get_config(self):
        return super().get_config() | {"slowness": self.slowness}


def test_an_outer_optimizer_may_be_of_a_class_of_ones_own():
    """A step of 0.5 / 5 by the pseudo-gradient of -1 that a bias of 1 is."""

    class SGD(SlowedSGD):
        """Keras has one of this name, too, and finds no class within a function."""

    for kind in (SlowedSGD, SGD):
        rule = hvd.sync.Outer(kind(0.5, slowness=5.0))
        assert rule == hvd.sync.Outer(kind(0.5, slowness=5.0)) != hvd.sync.Outer(kind(0.5, slowness=4.0))
        assert type(rule.new_optimizer()) is kind
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        sync = hvd.sync.DiLoCo(1, outer=kind(0.5, slowness=5.0))
        with use(SoloComm()):
            sync.begin(model)
            model.layers[0].bias.assign([1.0])
            sync.step()
        np.testing.assert_allclose(model.layers[0].bias, [0.1], rtol=1e-6)


def test_an_outer_optimizer_that_cannot_be_copied_is_refused_at_once():
    class Made(keras.optimizers.SGD):
        def __init__(self, pace):
            super().__init__(pace)

    with pytest.raises(TypeError, match=r"`optimizer` \(`outer` of a preset\) must be .* Made\.from_config"):
        hvd.sync.DiLoCo(4, outer=Made(0.1))


def test_an_answer_must_be_one():
    with pytest.raises(TypeError, match="`when` must be one of hvd"):
        hvd.sync.ParameterSync(32)


@pytest.mark.parametrize(
    ("size", "make", "message"),
    [
        (2, lambda s, r: s.PartialSync("nothing/*"), "matches none of"),
        (2, lambda s, r: s.PartialSync(s.Rotating(9), 9), "`fragments` must be at most the number of layers"),
        (3, lambda s, r: s.LocalSGD(2, whom=s.Pairs()), "even number of ranks"),
        (2, lambda s, r: s.LocalSGD(2 + r), "when: rank 0: Every(steps=2, delay=0, warmup_steps=0); rank 1"),
        (2, lambda s, r: s.LocalSGD(2, wire=["int8", "int4"][r]), "The ranks disagree about"),
    ],
)
def test_ranks_refuse_together(size, make, message):
    def rank(comm):
        try:
            make(hvd.sync, comm.rank).begin(small_model())
        except ValueError as error:
            return str(error)

    messages = run_ranks(size, rank)
    assert len(set(messages)) == 1
    assert message in messages[0]


def test_steps_before_begin():
    with pytest.raises(RuntimeError, match="has not begun"):
        hvd.sync.LocalSGD(2).step()


def test_unequal_starts_are_mentioned():
    def rank(comm):
        hvd.sync.LocalSGD(2).begin(small_model(seed=comm.rank))

    with pytest.warns(UserWarning, match="start from different weights"):
        run_ranks(2, rank)


# -- more than one training ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_asynchronous_fit_exchanges_again():
    def rank(comm):
        model = small_model()
        sync = hvd.sync.AsyncGossip(max_staleness=1)
        counts = []
        for _ in range(2):
            fit(model, data(), [sync], 8, epochs=2)
            counts.append(sync.totals.exchanges)
        return counts

    for first, both in run_ranks(2, rank):
        assert both >= first + 4


@pytest.mark.slow
def test_a_training_that_failed_leaves_nothing_in_flight():
    """Its exchange would put weights of long ago into the next training's."""

    def rank(comm):
        model = small_model()
        fail = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: 1 // (3 - batch))
        with pytest.raises(ZeroDivisionError):
            fit(model, data(), [hvd.sync.StreamingDiLoCo(4, 1, delay=3, wire="float32"), fail], 4)
        model.set_weights([np.full_like(w, 50) for w in model.get_weights()])
        ending = hvd.callbacks.ConsensusAveraging(verbose=0)
        return fit(model, data(), [hvd.sync.LocalSGD(2), ending], 4, keras.optimizers.SGD(0.0), epochs=1)

    for found in run_ranks(2, rank):
        for weight in found:
            np.testing.assert_array_equal(weight, np.full_like(weight, 50))


@pytest.mark.slow
def test_monitoring_a_sync_later_keeps_its_state(tmp_path):
    def rank(comm):
        model = small_model()
        sync = hvd.sync.DiLoCo(4)
        fit(model, data(), [sync], 8, epochs=1)
        before = saved(model, tmp_path / f"{comm.rank}.before.weights.h5")
        sync.listen(lambda exchanged: None, measures=True)
        sync.begin(model)
        return sync.steps, before, saved(model, tmp_path / f"{comm.rank}.after.weights.h5")

    for steps, before, after in run_ranks(2, rank):
        assert steps == 4
        momenta = [name for name in before if name.startswith("outer_")]
        assert np.any(before[max(momenta)] != 0)
        assert before.keys() == after.keys()
        for name in momenta:
            np.testing.assert_array_equal(before[name], after[name])


def test_checkpoints_of_other_settings_are_refused_by_all(tmp_path):
    def rank(comm):
        model = small_model()
        sync = hvd.sync.LocalSGD(2)
        sync.begin(model)
        model.save_weights(tmp_path / f"{comm.rank}.weights.h5")
        model = small_model()
        sync = hvd.sync.LocalSGD(2, wire="int8")
        sync.attach(model)
        model.load_weights(tmp_path / f"{comm.rank}.weights.h5")
        with pytest.raises(ValueError, match="written with the same sync settings"):
            sync.begin(model)

    run_ranks(2, rank)


def test_ranks_that_resume_at_different_steps_are_refused(tmp_path):
    def rank(comm):
        model = small_model()
        sync = hvd.sync.LocalSGD(4)
        sync.begin(model)
        for _ in range(2):
            sync.step()
            if comm.rank == 0:
                model.save_weights(tmp_path / "0.weights.h5")
        model = small_model()
        sync = hvd.sync.LocalSGD(4)
        sync.attach(model)
        if comm.rank == 0:  # the other one was killed before it could save
            model.load_weights(tmp_path / "0.weights.h5")
        with pytest.raises(ValueError, match="steps trained so far: rank 0: 2; rank 1: 0"):
            sync.begin(model)

    run_ranks(2, rank)


@pytest.mark.slow
def test_an_asynchronous_outer_optimizer_is_resumed_as_one(tmp_path):
    """Ranks are saved at different turns: without one momentum their common point would part again."""

    def common(found):
        return {name: value for name, value in found.items() if name.startswith(("centre_", "outer_"))}

    def prepared(comm):
        model = small_model()
        model.set_weights([w + comm.rank for w in model.get_weights()])
        outer = keras.optimizers.SGD(0.5, momentum=0.9)
        return model, hvd.sync.ParameterSync(hvd.sync.Always(max_staleness=1), rule=hvd.sync.Outer(outer))

    def rank(comm):
        file = tmp_path / f"{comm.rank}.weights.h5"
        model, sync = prepared(comm)
        sync.begin(model)
        sync.step()  # waits for an exchange, in which ranks move their common point by their momentum
        if comm.rank == 0:
            model.save_weights(file)
        exchanges = comm.allgather_object(sync.totals.exchanges, "hvdext.test.exchanges")[0]
        while comm.rank == 1 and sync.totals.exchanges < exchanges + 2:
            sync.step()
        if comm.rank == 1:
            model.save_weights(file)
        sync.end()
        model, sync = prepared(comm)
        sync.attach(model)
        model.load_weights(file)
        turn = read(file)["outer_0_of_0"]  # `iterations`: in which turn it was saved
        sync.begin(model)
        for _ in range(5):
            model.layers[0].bias.assign_add([0.1 + comm.rank] * 4)
            sync.step()
        sync.end()
        return turn, common(saved(model, file))

    (first, mine), (second, other) = run_ranks(2, rank)
    assert first != second
    assert mine
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        np.testing.assert_array_equal(value, other[name])


def test_weights_that_no_peer_can_help_stay_as_they_are():
    def rank(comm):
        model = small_model()
        sync = hvd.sync.LocalSGD(1, whom=hvd.sync.Exponential(), on_nonfinite="skip_rank")
        sync.begin(model)
        if comm.rank in (0, 1):  # rank 1 hears of rank 0 only in the first turn
            model.layers[1].bias.assign([np.nan])
        sync.step()
        first = model.layers[1].bias.numpy().item()
        sync.step()
        return first, model.layers[1].bias.numpy().item()

    found = run_ranks(4, rank)
    assert np.isnan(found[1][0])
    assert not np.isnan(found[1][1])


@pytest.mark.slow
def test_averaged_weights_of_the_optimizer_are_the_last_word():
    def rank(comm):
        model = small_model()
        optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
        sync = hvd.sync.StreamingDiLoCo(4, 1, delay=3, wire="float32")
        found = fit(model, [a[:24] for a in data()], [sync], 4, optimizer, epochs=1)
        averages = [v.numpy() for v in optimizer._model_variables_moving_average]
        return found, averages

    for found, averages in run_ranks(2, rank):
        for a, b in zip(found, averages, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize(
    ("make", "use_ema"),
    [
        (lambda s: s.StreamingDiLoCo(4, 1, delay=3, wire="float32"), False),
        (lambda s: s.PartialSync(s.All(), 4, delay=3), False),
        (lambda s: s.LocalSGD(2), True),
    ],
)
@pytest.mark.slow
def test_weights_that_a_callback_has_restored_stay(make, use_ema, stops):
    """Also where it stands before the sync, whose exchange is on its way when training ends."""

    def rank(comm):
        worse = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(age=epoch))
        options = {"patience": 1 if stops else 9, "mode": "min", "restore_best_weights": True}
        stop = keras.callbacks.EarlyStopping("age", **options)
        optimizer = keras.optimizers.SGD(0.05, use_ema=use_ema, ema_momentum=0.5)
        x, y = data()
        model = small_model()
        found = fit(model, (x + comm.rank, y), [worse, stop, make(hvd.sync)], 4, optimizer)
        return stop.best_epoch, stop.best_weights, found

    for best_epoch, best, found in run_ranks(2, rank):
        assert best_epoch == 0
        for a, b in zip(found, best, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_has_failed_on_its_way_is_told_to_all_ranks_at_the_end():
    """A rank whose last epoch has ended cannot know that the others are there already."""

    def rank(comm):
        model = small_model()
        sync = hvd.sync.LocalSGD(4, delay=3)
        sync.set_params({"epochs": 1})
        sync.begin(model)
        if comm.rank == 1:
            model.layers[1].bias.assign([np.nan])
        sync.step(4)
        if comm.rank == 0:
            sync.on_epoch_end(0)  # the last one
        comm.barrier("hvdext.test.end")
        with pytest.raises(ValueError, match="rank 1: small/out/bias"):
            sync.end()

    run_ranks(2, rank)


def test_a_step_within_a_graph_is_refused():
    with use(SoloComm()):
        sync = hvd.sync.LocalSGD(1)
        sync.begin(small_model())
        with pytest.raises(RuntimeError, match=r"outside of tf\.function"):
            tf.function(sync.step, autograph=False)()
