"""The callbacks, with threads as ranks."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks


class Subclassed(keras.Model):
    """Makes its variables when it sees the first batch."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(3, name="hidden")
        self.normalisation = keras.layers.BatchNormalization(name="normalisation")
        self.out = keras.layers.Dense(1, name="out")

    def call(self, x, training=False):
        return self.out(self.normalisation(self.hidden(x), training=training))


def _layers():
    return [keras.layers.Dense(3, name="hidden"), keras.layers.Dense(1, name="out")]


MODELS = {
    "built": lambda: keras.Sequential([keras.Input((2,)), *_layers()]),
    "lazy": lambda: keras.Sequential(_layers()),
    "subclassed": Subclassed,
    "functional": lambda: _functional(),
}


def _functional():
    x = keras.Input((2,))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dense(3, name="hidden")(x))
    return keras.Model(x, keras.layers.Dense(1, name="out")(hidden))


def _numbers(variables):
    return [v.numpy() for v in variables]


class Recorder(keras.callbacks.Callback):
    """All variables after each batch, and the logs of each epoch."""

    def __init__(self):
        super().__init__()
        self.batches = []
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(_numbers([*self.model.trainable_variables, *self.model.optimizer.variables]))

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))


def _equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# -- broadcast -----------------------------------------------------------------------------------------


def _train(comm, make, eagerly, callbacks):
    """Every rank draws weights and data of its own."""
    model = make()
    optimizer = keras.optimizers.Adam(0.1)
    model.compile(hvd.DistributedOptimizer(optimizer), "mse", run_eagerly=eagerly)
    data = np.random.default_rng(comm.rank)
    x = data.normal(size=(8, 2)).astype("float32")
    recorder = Recorder()
    model.fit(x, x[:, :1], 4, epochs=2, shuffle=False, verbose=0, callbacks=[*callbacks, recorder])
    return recorder.batches, comm.traffic()["broadcast"].calls if "broadcast" in comm.traffic() else 0


@pytest.mark.parametrize("eagerly", [False, True], ids=["graph", "eager"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_all_ranks_start_alike_exactly_once(name, eagerly):
    def run(comm):
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(1)
        return _train(comm, MODELS[name], eagerly, [callback])

    (first, calls), (second, other_calls) = run_ranks(2, run)
    assert calls == other_calls == 1
    assert len(first) == 4
    for mine, theirs in zip(first, second, strict=True):
        assert _equal(mine, theirs)


@pytest.mark.slow
def test_without_the_callback_they_are_told():
    with pytest.raises(tf.errors.InvalidArgumentError, match="The ranks do not hold the same before this"):
        run_ranks(2, lambda comm: _train(comm, MODELS["built"], False, []))


def _constant_model(name, value):
    make = keras.initializers.Constant(value)
    layers = [keras.layers.Dense(3, kernel_initializer=make), keras.layers.Dense(1, kernel_initializer=make)]
    return keras.Sequential(layers if name == "lazy" else [keras.Input((2,)), *layers])


@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.parametrize("name", ["built", "lazy"])
@pytest.mark.slow
def test_they_start_from_the_root(name, root):
    def run(comm):
        model = _constant_model(name, comm.rank + 1.0)
        # At learning rate 0 the weights stay what the broadcast has made them.
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
        x = np.ones((4, 2), "float32")
        broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(root)
        model.fit(x, x[:, :1], 4, verbose=0, callbacks=[broadcast])
        return [np.unique(weight).tolist() for weight in model.get_weights()]

    assert run_ranks(3, run) == [[[root + 1.0], [0.0]] * 2] * 3


def test_state_of_the_optimizer_comes_along():
    def run(comm):
        model = MODELS["built"]()
        model.compile(hvd.DistributedOptimizer(keras.optimizers.Adam(0.1)), "mse")
        model.optimizer.build(model.trainable_variables)
        model.optimizer.iterations.assign(10 * (comm.rank + 1))
        for variable in model.optimizer.variables[2:]:
            variable.assign(np.full(variable.shape, comm.rank + 1.0))
        model.optimizer.learning_rate = 0.25 * (comm.rank + 1)
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(1)
        callback.set_model(model)
        callback.set_params({"epochs": 1, "steps": 1})
        callback.on_train_begin()
        state = _numbers(model.optimizer.variables)
        return [int(state[0]), float(state[1]), [float(np.max(s)) for s in state[2:]]]

    assert run_ranks(3, run) == [[20, 0.5, [2.0] * 8]] * 3


@pytest.mark.slow
def test_training_again_does_not_broadcast_again():
    def run(comm):
        model = MODELS["built"]()
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        x = np.ones((4, 2), "float32")
        for _ in range(2):
            model.fit(x, x[:, :1], 4, verbose=0, callbacks=[callback])
        return comm.traffic()["broadcast"].calls

    assert run_ranks(2, run) == [1, 1]


@pytest.mark.parametrize("name", ["built", "lazy"])
@pytest.mark.slow
def test_another_model_is_broadcast_as_well(name):
    def run(comm):
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(1)
        x, found, calls = np.ones((4, 2), "float32"), [], []
        for value in (1.0, 5.0, 5.0):  # rank 0 has 1 and 5, rank 1 has 2 and 6
            model = _constant_model(name, comm.rank + value)
            model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0, name="sgd")), "mse")
            model.fit(x, x[:, :1], 4, verbose=0, callbacks=[callback])
            found.append([np.unique(weight).tolist() for weight in model.get_weights()])
            calls.append(comm.traffic()["broadcast"].calls)
        return found, calls

    first, second = [[2.0], [0.0]] * 2, [[6.0], [0.0]] * 2
    assert run_ranks(2, run) == [([first, second, second], [1, 2, 3])] * 2


def test_dropout_masks_stay_different():
    def run(comm):
        dropout = keras.layers.Dropout(0.5, seed=comm.rank)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), dropout])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        before = dropout.seed_generator.state.numpy()
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        callback.set_model(model)
        callback.set_params({"epochs": 1, "steps": 1})
        callback.on_train_begin()
        return before.tolist(), dropout.seed_generator.state.numpy().tolist(), model.get_weights()

    (before, after, weights), (other_before, other_after, other_weights) = run_ranks(2, run)
    assert before == after
    assert other_before == other_after
    assert before != other_before
    assert _equal(weights[:2], other_weights[:2])


def test_a_plain_optimizer_is_noticed():
    def run(comm):
        model = MODELS["built"]()
        model.compile(keras.optimizers.SGD(0.1, name="plain"), "mse")
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        callback.set_model(model)
        callback.set_params({"epochs": 1, "steps": 1})
        callback.on_train_begin()

    with pytest.warns(UserWarning, match="'plain' exchanges no gradients"):
        run_ranks(2, run)


def test_training_before_init():
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    callback.set_params({"epochs": 1, "steps": 1})
    with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
        callback.on_train_begin()


# -- metrics -------------------------------------------------------------------------------------------


def _samples(rank):
    """8 training and 2 validation samples on rank 0, 16 and 6 on rank 1."""
    generator = np.random.default_rng(rank)
    x = generator.normal(size=(8 * (rank + 1), 2)).astype("float32")
    return x[:, :1] + 1, x, x[: 2 + 4 * rank], (x[:, :1] + 1)[: 2 + 4 * rank]


def _fit_with_metrics(comm):
    y, x, val_x, val_y = _samples(comm.rank)
    model = MODELS["built"]()
    model.set_weights([np.full(w.shape, 0.3) for w in model.get_weights()])
    # Learning rate 0: the metrics of all steps are those of one set of weights. 2 steps on each rank.
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.0))
    model.compile(optimizer, "mse", metrics=["mae"])
    recorder = Recorder()
    history = model.fit(
        x,
        y,
        batch_size=len(x) // 2,
        validation_data=(val_x, val_y),
        verbose=0,
        callbacks=[hvd.callbacks.MetricAverageCallback(), recorder],
    )
    return {key: values[0] for key, values in history.history.items()}, recorder.logs[0]


@pytest.mark.slow
def test_history_and_later_callbacks_see_the_whole_job():
    results = run_ranks(2, _fit_with_metrics)
    plain = MODELS["built"]()
    plain.set_weights([np.full(w.shape, 0.3) for w in plain.get_weights()])
    plain.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"])
    shares = [_samples(rank) for rank in range(2)]
    y, x, val_x, val_y = [np.concatenate(column) for column in zip(*shares, strict=True)]
    expected = dict(zip(("loss", "mae"), plain.evaluate(x, y, verbose=0), strict=True))
    expected |= dict(zip(("val_loss", "val_mae"), plain.evaluate(val_x, val_y, verbose=0), strict=True))
    own = plain.evaluate(shares[0][1], shares[0][0], verbose=0)[0]
    assert abs(own - expected["loss"]) > 1e-3  # one rank's own loss is another
    for history, logs in results:
        assert history == logs
        assert history == pytest.approx(expected, rel=1e-5)
    assert results[0] == results[1]


# -- models that nobody can call -----------------------------------------------------------------------


class Gan(keras.Model):
    """As in Keras' own examples: a `train_step` and no `call`, an optimizer for each part."""

    def __init__(self, value, lazy=False):
        super().__init__(name="gan")
        start = keras.initializers.Constant(value)
        inputs = [] if lazy else [keras.Input((2,))]
        self.critic = keras.Sequential(
            [*inputs, keras.layers.Dense(1, kernel_initializer=start)], name="critic"
        )
        self.generator = keras.Sequential(
            [keras.Input((1,)), keras.layers.Dense(2, kernel_initializer=start)], name="generator"
        )

    def compile(self, critic_optimizer, generator_optimizer):
        super().compile()
        self.pairs = [(critic_optimizer, self.critic), (generator_optimizer, self.generator)]

    def train_step(self, data):
        for optimizer, part in self.pairs:
            with tf.GradientTape() as tape:
                made = self.generator(data[:, :1])
                loss = tf.reduce_mean(self.critic(data)) - tf.reduce_mean(self.critic(made))
            optimizer.apply(tape.gradient(loss, part.trainable_weights), part.trainable_weights)
        return {"loss": loss}


def _gan(comm, callbacks, **options):
    model = Gan(comm.rank + 1.0, **options)
    model.compile(*(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name=name)) for name in "cg"))
    x = np.full((8, 2), 1.0 + comm.rank, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about the optimizer that Keras makes up
        model.fit(x, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks)
    return model.get_weights()


@pytest.mark.slow
def test_a_model_with_a_train_step_and_no_call():
    def run(comm):
        return _gan(comm, [hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

    first, second = run_ranks(2, run)
    assert _equal(first, second)
    # All is linear in the data, whose mean is 1.5: critic x * w, generator z * v + d.
    w, v, d = np.ones(2), np.ones(2), np.zeros(2)
    for _ in range(2):
        w = w - 0.1 * (1.5 - (1.5 * v + d))
        v, d = v + 0.1 * 1.5 * w, d + 0.1 * w
    for mine, expected in zip(first, (w[:, np.newaxis], np.zeros(1), v[np.newaxis], d), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


def test_its_parts_must_be_built():
    def run(comm):
        return _gan(comm, [hvd.callbacks.BroadcastGlobalVariablesCallback(0)], lazy=True)

    with pytest.raises(ValueError, match=r"without a `call`.*Received: 'gan' with \['critic'"):
        run_ranks(2, run)
