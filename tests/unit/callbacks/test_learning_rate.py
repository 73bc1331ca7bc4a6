"""Schedules and warm-up, against the same training in NumPy, step by step."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.testing import run_ranks

STEPS = 3  # per epoch
BATCH = 2


class Recorder(keras.callbacks.Callback):
    """The learning rate and the weight after each batch, and "lr" of the logs."""

    def __init__(self):
        super().__init__()
        self.rates, self.weights, self.logged = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(self.model.optimizer.learning_rate.numpy()))
        self.weights.append(self.model.get_weights()[0].ravel().copy())

    def on_epoch_end(self, epoch, logs=None):
        self.logged.append(logs["lr"])


def _data(rank):
    x = np.random.default_rng(rank).normal(size=(STEPS * BATCH, 2)).astype("float32")
    return x, x @ np.float32([[2.0], [-1.0]])


def _model(optimizer, **options):
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile(optimizer, "mse", jit_compile=False, **options)
    return model


def _fit(comm, optimizer, callbacks, epochs, **options):
    model, recorder = _model(hvd.DistributedOptimizer(optimizer), **options), Recorder()
    x, y = _data(comm.rank)
    model.fit(x, y, BATCH, epochs, shuffle=False, verbose=0, callbacks=[*callbacks, recorder])
    return recorder, model


def _gradients(w, step, size):
    """Mean over the ranks of the mean squared error's gradient."""
    part = slice(step % STEPS * BATCH, (step % STEPS + 1) * BATCH)
    found = []
    for rank in range(size):
        x, y = (array[part].astype(float) for array in _data(rank))
        found.append(2 * x.T @ (x @ w - y[:, 0]) / BATCH)
    return np.mean(found, axis=0)


def _sgd(rates, size, momentum, nesterov=False, corrected=True):
    """SGD whose velocity holds gradients only, or (not corrected) gradients times the rate of their time."""
    w, u, weights = np.full(2, 0.5), np.zeros(2), []
    for step, rate in enumerate(rates):
        g = _gradients(w, step, size)
        inside, outside = (1, rate) if corrected else (rate, 1)
        u = momentum * u + inside * g
        w = w - outside * (momentum * u + inside * g if nesterov else u)
        weights.append(w)
    return np.array(weights)


def _sgd_with_momentum_of_one_step(rates, size, momentum, first_rate):
    """Keras' SGD, with momentum * new / old in the one step after a change of the rate."""
    w, v, old, weights = np.full(2, 0.5), np.zeros(2), first_rate, []
    for step, rate in enumerate(rates):
        v = momentum * rate / old * v - rate * _gradients(w, step, size)
        w, old = w + v, rate
        weights.append(w)
    return np.array(weights)


def _rmsprop(rates, size, momentum, rho=0.9):
    w, s, u, weights = np.full(2, 0.5), np.zeros(2), np.zeros(2), []
    for step, rate in enumerate(rates):
        g = _gradients(w, step, size)
        s = rho * s + (1 - rho) * g**2
        u = momentum * u + g / np.sqrt(s + 1e-7)
        w = w - rate * u
        weights.append(w)
    return np.array(weights)


def _schedule(**options):
    return hvd.callbacks.LearningRateScheduleCallback(0.1, lambda epoch: [1, 0.2, 0.7][int(epoch)], **options)


RATES = np.repeat([0.1, 0.02, 0.07], STEPS)
OPTIMIZERS = {
    "momentum": (
        lambda: keras.optimizers.SGD(0.05, momentum=0.9),
        lambda size: _sgd(RATES, size, 0.9),
    ),
    "nesterov": (
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True),
        lambda size: _sgd(RATES, size, 0.9, nesterov=True),
    ),
    "no momentum": (lambda: keras.optimizers.SGD(0.05), lambda size: _sgd(RATES, size, 0.0)),
    "rmsprop": (
        lambda: keras.optimizers.RMSprop(0.05, momentum=0.9),
        lambda size: _rmsprop(RATES, size, 0.9),
    ),
    "loss scale": (
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.9)),
        lambda size: _sgd(RATES, size, 0.9),
    ),
}


@pytest.mark.parametrize(("name", "size"), [("momentum", 1), *((name, 2) for name in OPTIMIZERS)])
@pytest.mark.slow
def test_rates_and_momentum_follow_the_paper(name, size):
    make, expected = OPTIMIZERS[name]
    for recorder, _ in run_ranks(size, lambda comm: _fit(comm, make(), [_schedule()], 3)):
        np.testing.assert_allclose(recorder.rates, RATES, rtol=1e-6)
        np.testing.assert_allclose(recorder.logged, RATES[::STEPS], rtol=1e-6)
        np.testing.assert_allclose(recorder.weights, expected(size), rtol=2e-4, atol=1e-5)


def test_correction_is_a_momentum_of_one_step_and_does_something():
    expected = _sgd(RATES, 1, 0.9)
    same = _sgd_with_momentum_of_one_step(RATES, 1, 0.9, RATES[0])
    np.testing.assert_allclose(same, expected, rtol=1e-9)
    uncorrected = _sgd(RATES, 1, 0.9, corrected=False)
    assert np.max(np.abs(uncorrected[STEPS:] - expected[STEPS:])) > 0.05
    options = {"momentum_correction": False}
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    ((recorder, _),) = run_ranks(1, lambda comm: _fit(comm, optimizer, [_schedule(**options)], 3))
    np.testing.assert_allclose(recorder.weights, uncorrected, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_each_batch_has_its_own_rate():
    def multiplier(epoch):
        return 1 / (1 + epoch)

    def run(comm):
        schedule = hvd.callbacks.LearningRateScheduleCallback(0.1, multiplier, staircase=False)
        return _fit(comm, keras.optimizers.SGD(0.05, momentum=0.9), [schedule], 2)

    rates = [0.1 / (1 + step / STEPS) for step in range(2 * STEPS)]
    for recorder, _ in run_ranks(2, run):
        np.testing.assert_allclose(recorder.rates, rates, rtol=1e-6)
        np.testing.assert_allclose(recorder.weights, _sgd(rates, 2, 0.9), rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_warm_up_then_decays():
    """As in training ImageNet: up to the full rate, then a tenth of it from some epoch on."""

    def run(comm):
        schedule = hvd.callbacks.LearningRateScheduleCallback
        callbacks = [
            hvd.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=2, verbose=1),
            schedule(0.1, 1.0, start_epoch=2, end_epoch=3),
            schedule(0.1, lambda epoch: 1e-1, start_epoch=3, end_epoch=4),
            schedule(0.1, 0.5, start_epoch=4),
        ]
        return _fit(comm, keras.optimizers.SGD(0.1, momentum=0.9), callbacks, 6)

    warm = [0.1 / 2 * (1 + (step + 1) / STEPS / 2) for step in range(2 * STEPS)]
    assert warm[-1] == pytest.approx(0.1)
    rates = np.array([*warm, *np.repeat([0.1, 0.01, 0.1, 0.05], STEPS)])
    for recorder, _ in run_ranks(2, run):
        np.testing.assert_allclose(recorder.rates, rates, rtol=1e-6)
        np.testing.assert_allclose(recorder.logged, rates[STEPS - 1 :: STEPS], rtol=1e-6)
        np.testing.assert_allclose(recorder.weights, _sgd(rates, 2, 0.9), rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_the_end_of_the_warm_up_is_printed_once(capsys):
    def run(comm):
        warm_up = hvd.callbacks.LearningRateWarmupCallback(0.25, warmup_epochs=1, verbose=1)
        _fit(comm, keras.optimizers.SGD(0.1), [warm_up], 2)

    run_ranks(2, run)
    assert capsys.readouterr().out.count("Epoch 1: the warm-up has ended, the learning rate is 0.25.") == 1


def test_steps_per_execution():
    """The rate of an execution is that of its first batch; the correction acts once."""

    def run(comm):
        schedule = hvd.callbacks.LearningRateScheduleCallback(0.1, lambda e: 1 / (1 + e), staircase=False)
        return _fit(comm, keras.optimizers.SGD(0.1, momentum=0.9), [schedule], 2, steps_per_execution=STEPS)

    ((recorder, _),) = run_ranks(1, run)
    rates = np.repeat([0.1, 0.05], STEPS)
    np.testing.assert_allclose(recorder.weights, _sgd(rates, 1, 0.9)[STEPS - 1 :: STEPS], rtol=2e-4)


def test_adam_is_left_alone():
    def run(comm, correction):
        schedule = _schedule(momentum_correction=correction)
        return _fit(comm, keras.optimizers.Adam(0.05), [schedule], 3)[0].weights

    (corrected,), (plain,) = (run_ranks(1, run, correction) for correction in (True, False))
    np.testing.assert_array_equal(corrected, plain)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
def test_saved_models_are_plain_keras(kind, tmp_path):
    """A model saved within training and one saved after it, opened without anything of ours."""

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.save(tmp_path / "within.keras")

    def run(comm):
        optimizer = getattr(keras.optimizers, kind)(0.05, momentum=0.9)
        _, model = _fit(comm, optimizer, [_schedule(), Save()], 2)
        model.save(tmp_path / "after.keras")
        return model.get_weights(), [v.numpy() for v in model.optimizer.variables]

    ((weights, state),) = run_ranks(1, run)
    for name in ("within", "after"):
        opened = keras.saving.load_model(tmp_path / f"{name}.keras")
        assert type(opened.optimizer) is getattr(keras.optimizers, kind)
        assert opened.optimizer.momentum == 0.9
        assert isinstance(opened.optimizer.momentum, float)
        np.testing.assert_array_equal(opened.get_weights()[0], weights[0])
        for mine, saved in zip(opened.optimizer.variables, state, strict=True):
            np.testing.assert_array_equal(mine.numpy(), saved)


def test_steps_per_epoch_of_a_generator():
    def run(comm, steps):
        def batches():
            while True:
                yield _data(0)

        warm_up = hvd.callbacks.LearningRateWarmupCallback(0.1, 2, steps_per_epoch=steps)
        model = _model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
        warm_up.set_model(model)
        warm_up.set_params({"steps": None})
        warm_up.on_train_begin()
        return warm_up.multiplier(0)

    assert run_ranks(2, run, 4) == [pytest.approx((1 + 1 / 8) / 2)] * 2
    with pytest.raises(ValueError, match=r"`steps_per_epoch` must be given to .*LearningRateWarmupCallback"):
        run_ranks(2, run, None)


def _begin(comm, callback, optimizer, steps=3):
    callback.set_model(_model(hvd.DistributedOptimizer(optimizer)))
    callback.set_params({"steps": steps})
    try:
        callback.on_train_begin()
    except ValueError as error:
        return str(error)
    return "no error"


def test_optimizers_without_a_rate_to_set():
    def run(comm):
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
        return _begin(comm, _schedule(), keras.optimizers.SGD(schedule))

    for text in run_ranks(2, run):
        assert text.startswith("`learning_rate` of the optimizer must be a number")
        assert "ExponentialDecay" in text


def test_an_error_of_one_rank_reaches_all():
    def run(comm):
        rate = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5) if comm.rank else 0.1
        return _begin(comm, _schedule(), keras.optimizers.SGD(rate))

    first, second = run_ranks(2, run)
    assert first == second
    assert "rank 1: `learning_rate` of the optimizer must be a number" in first


def test_ranks_with_different_settings():
    def run(comm):
        schedule = hvd.callbacks.LearningRateScheduleCallback(0.1 * (comm.rank + 1), 1.0)
        return _begin(comm, schedule, keras.optimizers.SGD(0.1))

    first, second = run_ranks(2, run)
    assert first == second
    assert "rank 0: 0.1; rank 1: 0.2" in first


def test_ranks_with_different_batches_follow_the_longest():
    def run(comm):
        warm_up = hvd.callbacks.LearningRateWarmupCallback(0.1, 1)
        text = _begin(comm, warm_up, keras.optimizers.SGD(0.1), steps=2 + 2 * comm.rank)
        return text, warm_up.multiplier(0)

    assert run_ranks(2, run) == [("no error", pytest.approx((1 + 1 / 4) / 2))] * 2


def test_ranks_that_run_out_of_batches_cannot_correct():
    def run(comm, momentum, correction):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=momentum))
        callback = hvd.callbacks.LearningRateWarmupCallback(0.1, 1, momentum_correction=correction)
        callback.set_model(_model(optimizer))
        hvd.callbacks.UnevenBatches().set_model(callback.model)
        callback.set_params({"steps": 2 + comm.rank})
        try:
            callback.on_train_begin()
        except ValueError as error:
            return str(error)
        return "no error"

    assert run_ranks(2, run, 0.0, True) == run_ranks(2, run, 0.9, False) == ["no error"] * 2
    for text in run_ranks(2, run, 0.9, True):
        assert text.startswith("`momentum_correction` must be False where ranks may run out of batches")


WRONG = {
    "initial_lr": ({"initial_lr": None, "multiplier": 1.0}, "`initial_lr` must be a number"),
    "multiplier": ({"initial_lr": 0.1, "multiplier": "half"}, "`multiplier` must be a number or a function"),
    "start": ({"initial_lr": 0.1, "multiplier": 1.0, "start_epoch": -1}, "`start_epoch` must be"),
    "end": (
        {"initial_lr": 0.1, "multiplier": 1.0, "start_epoch": 3, "end_epoch": 3},
        "`end_epoch` must be .* start_epoch=3, end_epoch=3",
    ),
    "steps": ({"initial_lr": 0.1, "multiplier": 1.0, "steps_per_epoch": 0}, "`steps_per_epoch` must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        hvd.callbacks.LearningRateScheduleCallback(**arguments)


def test_wrong_warm_up():
    with pytest.raises(ValueError, match="`warmup_epochs` must be a positive number"):
        hvd.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=0)
    with pytest.raises(TypeError, match="Did you mean `warmup_epochs`"):
        hvd.callbacks.LearningRateWarmupCallback(0.1, warmup_epoch=3)
