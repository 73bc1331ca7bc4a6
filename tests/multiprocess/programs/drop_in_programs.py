"""Names of Horovod that no other table has: partial exchanges, loading, warm-up, who is where."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program


def _run_places(hvd):
    return {
        name: getattr(hvd, name)()
        for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
    }


def _check_places(ranks):
    for rank, places in enumerate(ranks):  # all on one host
        assert places == {
            "rank": rank,
            "size": len(ranks),
            "local_rank": rank,
            "local_size": len(ranks),
            "cross_rank": 0,
            "cross_size": 1,
        }


def _run_global_variables(hvd):
    try:
        hvd.broadcast_global_variables(0)
    except RuntimeError as error:
        return str(error)
    return "no error"


def _check_global_variables(ranks):
    for text in ranks:
        assert "hvd.broadcast_variables(model.variables" in text


def _two_layers():
    shared, local = keras.layers.Dense(1, use_bias=False), keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((1,)), shared, local])
    model.set_weights([np.ones((1, 1)), np.ones((1, 1))])
    return model, local


def _run_partial_optimizer(hvd):
    model, local = _two_layers()
    optimizer = hvd.PartialDistributedOptimizer(keras.optimizers.SGD(1.0), local_layers=[local])
    optimizer.apply([tf.fill([1, 1], float(hvd.rank()))] * 2, model.trainable_variables)
    return [w.item() for w in model.get_weights()]


def _check_partial_optimizer(ranks):
    # Rank r's gradients are r: their mean for the shared layer, its own r / size for the local one.
    size = len(ranks)
    for rank, (shared, local) in enumerate(ranks):
        assert shared == 1 - (size - 1) / 2
        assert local == np.float32(1) - np.float32(rank / size)


def _run_partial_tape(hvd):
    model, local = _two_layers()
    x = tf.constant([[hvd.rank() + 1.0]])
    with hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=local) as tape:
        y = tf.reduce_sum(model(x))
    return [g.numpy().item() for g in tape.gradient(y, model.trainable_variables)]


def _check_partial_tape(ranks):
    # Both weights are 1, so that both gradients of rank r are its input, r + 1.
    size = len(ranks)
    for rank, gradients in enumerate(ranks):
        np.testing.assert_allclose(gradients, [(size + 1) / 2, (rank + 1) / size], rtol=1e-6)


def _run_load_model(hvd):
    """Momentum 0.5, one step with gradient 2 before saving; then a step with gradient r on rank r."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.set_weights([np.zeros((1, 1))])
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5)
    model.compile(optimizer, "mse")
    optimizer.apply([tf.fill([1, 1], 2.0)], model.trainable_variables)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model.keras"))
        loaded = hvd.load_model(Path(folder, "model.keras"))
    loaded.optimizer.apply([tf.fill([1, 1], float(hvd.rank()))], loaded.trainable_variables)
    return loaded.get_weights()[0].item(), int(loaded.optimizer.iterations)


def _check_load_model(ranks):
    # Velocities -2, then 0.5 * -2 - mean.
    mean = (len(ranks) - 1) / 2
    assert ranks == [[-2 - 1 - mean, 2]] * len(ranks)


def _run_warm_up(hvd):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.8, name="warm")), "mse")
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.8, warmup_epochs=2),
        hvd.callbacks.LearningRateScheduleCallback(0.8, lambda epoch: 0.1, start_epoch=2),
    ]
    x = np.ones((2, 1))
    return model.fit(x, x, 1, epochs=3, verbose=0, callbacks=callbacks).history["lr"]


def _check_warm_up(ranks):
    size = len(ranks)
    # From 0.8 / size; at the end of the first of two epochs half of the way is done.
    half = 0.8 / size * (1 + (size - 1) / 2)
    for rates in ranks:
        np.testing.assert_allclose(rates, [half, 0.8, 0.08], rtol=1e-6)


def _run_table_of_its_own(hvd):
    """A table per rank, of its own length, before a shared head; all in the function of the first step."""
    r = hvd.rank()
    table = tf.Variable(tf.fill([3 + r, 2], float(r)), name=f"table_{r}")
    head = tf.Variable([[1.0 + r], [2.0]], name="head")
    optimizer = keras.optimizers.SGD(1.0, momentum=0.5)
    optimizer.build([table, head])

    @tf.function
    def step(first):
        if first:
            hvd.broadcast_variables([head], root_rank=1)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.matmul(tf.gather(table, [r]), head))
        tape = hvd.DistributedGradientTape(tape)
        tape.register_local_source(table)
        gradients = tape.gradient(loss, [table, head])
        optimizer.apply([tf.convert_to_tensor(g) for g in gradients], [table, head])
        return loss

    return [step(True).numpy().item(), table.numpy().tolist(), head.numpy().tolist()]


def _check_table_of_its_own(ranks):
    size = len(ranks)
    mean = sum(range(size)) / size  # of the rows that the ranks have looked up
    for rank, (loss, table, head) in enumerate(ranks):
        assert loss == 4.0 * rank  # with rank 1's head, [2, 2]
        expected = np.full((3 + rank, 2), float(rank))
        expected[rank] -= 2 / size
        np.testing.assert_allclose(table, expected)
        np.testing.assert_allclose(head, [[2 - mean], [2 - mean]])


def _run_watched(hvd):
    def gradient(shape):
        x = tf.fill(shape, hvd.rank() + 1.0)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(x**2)
        return hvd.DistributedGradientTape(tape).gradient(loss, x).numpy().tolist()

    found = gradient([2, 3])
    try:  # as long, and so one message: but other numbers would meet
        gradient([3, 2] if hvd.rank() == 1 else [2, 3])
    except tf.errors.FailedPreconditionError as error:
        return found, str(error)
    return found, "no error"


def _check_watched(ranks):
    for found, text in ranks:
        assert found == np.full((2, 3), len(ranks) + 1.0).tolist()
        assert "Mismatched ALLREDUCE tensor shapes" in text
        assert "[2, 3]" in text
        assert "[3, 2]" in text


PROGRAMS = {
    "table of its own": Program(_run_table_of_its_own, _check_table_of_its_own, sizes=(2,)),
    "watched tensors": Program(_run_watched, _check_watched, sizes=(2,)),
    "places": Program(_run_places, _check_places, sizes=(2,)),
    "broadcast_global_variables": Program(_run_global_variables, _check_global_variables, sizes=(2,)),
    "PartialDistributedOptimizer": Program(_run_partial_optimizer, _check_partial_optimizer, sizes=(2,)),
    "PartialDistributedGradientTape": Program(_run_partial_tape, _check_partial_tape, sizes=(2,)),
    "load_model": Program(_run_load_model, _check_load_model, sizes=(2,)),
    "warm-up and schedule": Program(_run_warm_up, _check_warm_up, sizes=(2,)),
}
