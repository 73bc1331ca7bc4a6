"""Ranks with different numbers of batches, with every way to exchange; threads as ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks
from tests.multiprocess.programs import uneven_programs

COUNTS = (4, 1)


class Tables(keras.Model):
    """A sparse gradient, a dense one, and one that may stay local."""

    def __init__(self):
        super().__init__()
        self.rows = keras.layers.Embedding(5, 2, name="rows")
        self.out = keras.layers.Dense(1, name="out", dtype="float32")

    def call(self, x):
        return self.out(tf.reduce_sum(self.rows(x), axis=1))


def _data(rank):
    generator = np.random.default_rng([3, rank])
    n = COUNTS[rank] * 2
    return generator.integers(0, 5, size=(n, 2)), generator.normal(size=(n, 1)).astype("float32")


def _model(policy=None):
    keras.config.set_dtype_policy(policy or "float32")
    model = Tables()
    model(np.zeros((1, 2), int))
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(size=w.shape) for w in model.get_weights()])
    return model


def _fit(comm, options, make=lambda: keras.optimizers.SGD(0.1, name="sgd"), policy=None):
    model = _model(policy)
    model.compile(hvd.DistributedOptimizer(make(), **options), "mse")
    x, y = _data(comm.rank)
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.UnevenBatches()]
    model.fit(x, y, 2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    return [w.numpy() for w in model.trainable_variables], int(model.optimizer.iterations)


def _gradients(model, rank, step):
    x, y = _data(rank)
    rows = slice(2 * step, 2 * step + 2)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x[rows]) - y[rows]) ** 2)
    return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, model.trainable_variables)]


def _simulated(combine):
    """Plain SGD in one process, on what `combine` makes of the contributing ranks' gradients."""
    model = _model()
    for _ in range(2):
        for step in range(max(COUNTS)):
            present = [rank for rank in range(2) if step < COUNTS[rank]]
            everyone = [_gradients(model, rank, step) for rank in present]
            for i, variable in enumerate(model.trainable_variables):
                variable.assign_sub(0.1 * combine([gradients[i] for gradients in everyone]))
    return [w.numpy() for w in model.trainable_variables]


def _adasum(gradients):
    if len(gradients) == 1:
        return gradients[0]
    a, b = gradients
    dot = np.sum(a * b)
    return (1 - dot / (2 * np.sum(a * a))) * a + (1 - dot / (2 * np.sum(b * b))) * b


def _mean(gradients):
    return np.mean(gradients, axis=0)


OPTIONS = {
    "average": ({}, _mean, 1e-5),
    "sparse as dense": ({"sparse_as_dense": True}, _mean, 1e-5),
    "predivide": ({"gradient_predivide_factor": 2.0}, _mean, 1e-5),
    "one bucket each": ({"groups": 3}, _mean, 1e-5),
    "sum": ({"op": hvd.Sum}, lambda gradients: np.sum(gradients, axis=0), 1e-5),
    "fp16": ({"compression": hvd.Compression.fp16}, _mean, 2e-3),
    "adasum": ({"op": hvd.Adasum, "sparse_as_dense": True}, _adasum, 1e-5),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.slow
def test_every_way_to_combine(name):
    options, combine, tolerance = OPTIONS[name]
    ranks = run_ranks(2, _fit, options)
    for mine, first, wanted in zip(ranks[1][0], ranks[0][0], _simulated(combine), strict=True):
        np.testing.assert_array_equal(mine, first)
        np.testing.assert_allclose(first, wanted, atol=tolerance)
    assert [updates for _, updates in ranks] == [8, 8]


@pytest.mark.slow
def test_an_optimizer_with_state_of_its_own_stays_equal():
    ranks = run_ranks(2, _fit, {}, lambda: keras.optimizers.Adam(0.1, weight_decay=0.01, use_ema=True))
    for mine, first in zip(ranks[1][0], ranks[0][0], strict=True):
        np.testing.assert_array_equal(mine, first)


@pytest.mark.slow
def test_mixed_precision():
    try:
        ranks = run_ranks(2, _fit, {}, _loss_scaled, "mixed_float16")
    finally:
        keras.config.set_dtype_policy("float32")
    for mine, first, wanted in zip(ranks[1][0], ranks[0][0], _simulated(_mean), strict=True):
        np.testing.assert_array_equal(mine, first)
        np.testing.assert_allclose(first, wanted, atol=2e-2)


def _loss_scaled():
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, name="sgd"), initial_scale=8.0)


@pytest.mark.slow
def test_local_variables_wait_for_their_own_batches():
    ranks = run_ranks(2, _fit, {"select": "*/kernel", "scale_local_gradients": False})
    (rows0, kernel0, bias0), (rows1, kernel1, bias1) = [weights for weights, _ in ranks]
    np.testing.assert_array_equal(kernel0, kernel1)
    start = [w.numpy() for w in _model().trainable_variables]
    assert np.abs(rows1 - start[0]).max() > 0
    # Rank 1 has trained one batch per epoch, rank 0 four: two and eight updates of its bias.
    assert bias0 != bias1
    assert np.abs(rows0 - rows1).max() > 0


def test_local_variables_make_no_update_without_a_batch_of_their_own():
    def one(comm):
        model = _model()
        optimizer = hvd.DistributedOptimizer(
            keras.optimizers.SGD(1.0, momentum=0.9, name="sgd"), uneven_batches=True, select="*/kernel"
        )
        variables = [model.out.kernel, model.out.bias]
        optimizer.build(variables)
        before = model.out.bias.numpy().item()
        for _ in range(3 if comm.rank == 0 else 1):
            optimizer.apply([tf.ones((2, 1)), tf.ones((1,))], variables)
        hvd.join(optimizer, variables)
        return before - model.out.bias.numpy().item()

    # Momentum 0.9, gradient 1/2 (scaled by the contributors: 1/2 with two of them, 1 alone).
    assert run_ranks(2, one) == pytest.approx([0.5 + (0.45 + 1) + (0.9 * 1.45 + 1), 0.5])


@pytest.mark.slow
def test_micro_batches_are_carried_into_the_next_epoch():
    counts = (5, 3)

    def one(comm):
        model = uneven_programs.make_model()
        optimizer = keras.optimizers.SGD(0.1, name="sgd")
        model.compile(hvd.DistributedOptimizer(optimizer, backward_passes_per_step=2), "mse")
        x, y = uneven_programs.samples(comm.rank, counts[comm.rank])
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.UnevenBatches()]
        model.fit(x, y, 2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        return model.get_weights()[0].ravel(), int(optimizer.iterations)

    shards = [uneven_programs.samples(rank, n) for rank, n in enumerate(counts)]
    weights = uneven_programs.start()[:, 0]
    kept = [0.0, 0.0]  # each rank's sum of gradients since its last update
    passes = [0, 0]
    updates = 0
    for _ in range(2):
        steps = [0, 0]
        while any(s < n for s, n in zip(steps, counts, strict=True)):
            ready = []
            for rank in range(2):  # each rank goes on until it has two micro-batches or none left
                while steps[rank] < counts[rank] and passes[rank] < 2:
                    gradient = uneven_programs.gradient(weights, *shards[rank], steps[rank])
                    kept[rank], passes[rank], steps[rank] = (
                        kept[rank] + gradient,
                        passes[rank] + 1,
                        steps[rank] + 1,
                    )
                if passes[rank] == 2:
                    ready.append(kept[rank])
                    kept[rank], passes[rank] = 0.0, 0
            if ready:
                weights = weights - 0.1 * np.mean(ready, axis=0)
                updates += 1
    for found, count in run_ranks(2, one):
        np.testing.assert_allclose(found, weights, atol=1e-5)
        assert count == updates == 5


@pytest.mark.slow
def test_the_learning_rate_is_that_of_the_ranks_with_a_batch():
    class Halving(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = 0.1 / 2**batch

    def one(comm):
        model = uneven_programs.make_model()
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name="sgd")), "mse")
        x, y = uneven_programs.samples(comm.rank, COUNTS[comm.rank])
        callbacks = [
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.UnevenBatches(),
            Halving(),
        ]
        model.fit(x, y, 2, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
        return model.get_weights()[0].ravel()

    weights = uneven_programs.start()[:, 0]
    shards = [uneven_programs.samples(rank, n) for rank, n in enumerate(COUNTS)]
    for step in range(4):
        present = [shards[rank] for rank in range(2) if step < COUNTS[rank]]
        gradients = [uneven_programs.gradient(weights, x, y, step) for x, y in present]
        weights = weights - 0.1 / 2**step * np.mean(gradients, axis=0)
    for found in run_ranks(2, one):
        np.testing.assert_allclose(found, weights, atol=1e-5)


@pytest.mark.slow
def test_validation_sees_the_weights_of_the_whole_epoch():
    def one(comm):
        model = uneven_programs.make_model()
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name="sgd")), "mse")
        x, y = uneven_programs.samples(comm.rank, COUNTS[comm.rank])
        same = uneven_programs.samples(9, 3)
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.UnevenBatches()]
        history = model.fit(
            x, y, 2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks, validation_data=same
        )
        return history.history["val_loss"], model.evaluate(*same, verbose=0)

    (first, at_end), (second, _) = run_ranks(2, one)
    assert first == second
    assert first[-1] == pytest.approx(at_end, rel=1e-6)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.slow
def test_several_steps_per_execution(steps):
    def one(comm):
        model = uneven_programs.make_model()
        optimizer = keras.optimizers.SGD(uneven_programs.RATE, momentum=uneven_programs.MOMENTUM, name="sgd")
        model.compile(hvd.DistributedOptimizer(optimizer), "mse", steps_per_execution=steps)
        x, y = uneven_programs.samples(comm.rank, (6, 6 - steps)[comm.rank])
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.UnevenBatches()]
        model.fit(x, y, 2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
        return model.get_weights()[0].ravel()

    for found in run_ranks(2, one):
        np.testing.assert_allclose(found, uneven_programs.expected((6, 6 - steps), 2)[0], atol=1e-5)


@pytest.mark.slow
def test_the_same_model_trains_on_without_the_callback():
    def one(comm):
        model = uneven_programs.make_model()
        optimizer = keras.optimizers.SGD(uneven_programs.RATE, momentum=uneven_programs.MOMENTUM, name="sgd")
        model.compile(hvd.DistributedOptimizer(optimizer), "mse")
        x, y = uneven_programs.samples(comm.rank, 3)
        broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
        for callbacks in ([broadcast], [broadcast, hvd.callbacks.UnevenBatches()], [broadcast]):
            model.fit(x, y, 2, shuffle=False, verbose=0, callbacks=callbacks)
        return model.get_weights()[0].ravel(), comm.traffic()["grad"].calls

    for found, calls in run_ranks(2, one):
        np.testing.assert_allclose(found, uneven_programs.expected((3, 3), 3)[0], atol=1e-5)
        # Nine exchanges of gradients; in the second epoch three roll calls and the one that ends it.
        assert calls == 9 + 4


@pytest.mark.slow
def test_counters_stop_with_the_data():
    """Keras tries one step more where a dataset's length is unknown; it must not count."""

    def one(comm):
        model = uneven_programs.make_model()
        optimizer = keras.optimizers.SGD(0.1, name="sgd")
        model.compile(hvd.DistributedOptimizer(optimizer, backward_passes_per_step=2), "mse")
        data = uneven_programs.inputs("from_generator", *uneven_programs.samples(comm.rank, 2))
        model.fit(**data, epochs=3, verbose=0)
        return int(optimizer.iterations)

    assert run_ranks(2, one) == [3, 3]


# -- bad input ---------------------------------------------------------------------------------------


def _refused(comm, make):
    model = make()
    x, y = uneven_programs.samples(comm.rank, 1)
    with pytest.raises(ValueError) as error:
        model.fit(x, y, 2, verbose=0, callbacks=[hvd.callbacks.UnevenBatches()])
    return str(error.value)


def _compiled(optimizer, model=None):
    model = model or uneven_programs.make_model()
    model.compile(optimizer, "mse")
    return model


REFUSED = {
    "needs a model compiled with hvd.DistributedOptimizer": lambda: _compiled(keras.optimizers.SGD()),
    "use `backward_passes_per_step`": lambda: _compiled(
        hvd.DistributedOptimizer(keras.optimizers.SGD(gradient_accumulation_steps=2))
    ),
    "needs a built model": lambda: _compiled(
        hvd.DistributedOptimizer(keras.optimizers.SGD()), keras.Sequential([keras.layers.Dense(1)])
    ),
    "exchange nothing within the forward pass": lambda: _compiled(
        hvd.DistributedOptimizer(keras.optimizers.SGD()),
        keras.Sequential([keras.Input((3,)), hvd.SyncBatchNormalization(), keras.layers.Dense(1)]),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_are_the_same_on_all_ranks(message):
    messages = run_ranks(2, _refused, REFUSED[message])
    assert messages[0] == messages[1]
    assert message in messages[0]


def test_the_callback_on_one_rank_only_is_an_error_on_both():
    def one(comm):
        model = _compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(name="sgd")))
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
        if comm.rank == 1:
            callbacks.append(hvd.callbacks.UnevenBatches())
        with pytest.raises(ValueError, match=r"The ranks disagree about model\.fit"):
            model.fit(*uneven_programs.samples(comm.rank, 2), 2, verbose=0, callbacks=callbacks)

    run_ranks(2, one)


def test_different_steps_without_the_callback_name_it():
    def one(comm):
        model = _compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(name="sgd")))
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
        with pytest.raises(ValueError, match="UnevenBatches"):
            model.fit(*uneven_programs.samples(comm.rank, 1 + comm.rank), 2, verbose=0, callbacks=callbacks)

    run_ranks(2, one)


def test_join_says_what_it_needs():
    def one(comm):
        plain = hvd.DistributedOptimizer(keras.optimizers.SGD(name="sgd"))
        with pytest.raises(ValueError, match=r"uneven_batches=True.*lacks it"):
            hvd.join(plain)
        with pytest.raises(ValueError, match="is not distributed"):
            hvd.join(keras.optimizers.SGD())
        unbuilt = hvd.DistributedOptimizer(keras.optimizers.SGD(name="sgd"), uneven_batches=True)
        with pytest.raises(ValueError, match="must be built"):
            hvd.join(unbuilt)

    run_ranks(2, one)


def test_one_rank_alone():
    def one(comm):
        return uneven_programs.fit(hvd, (3,), "arrays")

    ((weights, updates),) = run_ranks(1, one)
    np.testing.assert_allclose(weights[-1], uneven_programs.expected((3,))[0], atol=1e-5)
    assert updates == 12


@pytest.mark.slow
def test_what_the_user_has_asked_for_outlives_the_callback():
    def one(comm):
        model = uneven_programs.make_model()
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name="sgd"), uneven_batches=True)
        model.compile(optimizer, "mse")
        x, y = uneven_programs.samples(comm.rank, 1 + comm.rank)
        model.fit(x, y, 2, verbose=0, callbacks=[hvd.callbacks.UnevenBatches()])
        hvd.join(optimizer)

    run_ranks(2, one)


def test_evaluation_with_the_callback_changes_no_training():
    def one(comm):
        model = _compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, name="sgd")))
        x, y = uneven_programs.samples(comm.rank, 1)
        if comm.rank == 0:
            model.evaluate(x, y, verbose=0, callbacks=[hvd.callbacks.UnevenBatches()])
            model.predict(x, verbose=0, callbacks=[hvd.callbacks.UnevenBatches()])
        model.fit(x, y, 2, verbose=0, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

    run_ranks(2, one)


def test_a_rank_without_a_batch_must_hold_the_same_variables():
    def one(comm):
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(name="sgd"), uneven_batches=True)
        variables = [keras.Variable(np.zeros(n), name=f"v{n}") for n in (1, 2)]
        optimizer.build(variables)
        step = [
            lambda: optimizer.apply([tf.ones(1), tf.ones(2)], variables),
            lambda: hvd.join(optimizer, variables[:1]),
        ]
        with pytest.raises(ValueError, match="variable 1: rank 0: v2"):
            step[comm.rank]()

    run_ranks(2, one)


def test_commits_at_every_batch_are_refused():
    def one(comm):
        model = _compiled(hvd.DistributedOptimizer(keras.optimizers.SGD(name="sgd")))
        commit = hvd.elastic.CommitStateCallback(hvd.elastic.State(epoch=0))
        with pytest.raises(ValueError, match="needs equally many batches"):
            model.fit(
                *uneven_programs.samples(0, 1), verbose=0, callbacks=[hvd.callbacks.UnevenBatches(), commit]
            )

    run_ranks(2, one)


def test_another_job_agrees_anew():
    optimizers = [hvd.DistributedOptimizer(keras.optimizers.SGD(1.0, name="sgd")) for _ in range(3)]
    variables = [[keras.Variable([0.0], name="weight")] for _ in range(3)]

    def one(comm):
        optimizers[comm.rank].apply([tf.constant([comm.rank + 1.0])], variables[comm.rank])
        return variables[comm.rank][0].numpy().item(), comm.traffic()["agreement"].calls

    assert run_ranks(2, one) == [(-1.5, 2), (-1.5, 2)]
    # The third is new, and the others compare their settings with it, then their weights.
    with pytest.raises(tf.errors.InvalidArgumentError, match="do not hold the same"):
        run_ranks(3, one)
    variables[2][0].assign([-1.5])
    optimizers[2].iterations.assign(1)
    assert run_ranks(3, one) == [(-3.5, 2), (-3.5, 2), (-3.5, 2)]
