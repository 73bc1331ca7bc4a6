"""mixed_float16: a gradient that overflows on one rank makes all ranks skip that step."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program

STEPS = 8
BAD_STEP = 3  # from 0: its batch overflows float16, on rank 1 only


def _batch(rank, step):
    generator = np.random.default_rng([rank, step])
    x = generator.normal(size=(4, 3)).astype("float32")
    y = 0.1 * x.sum(axis=1, keepdims=True)
    if rank == 1 and step == BAD_STEP:
        x[2, 0] = 1e6  # float16 ends at 65504
    return x, y


def _train(hvd, **options):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(4, name="hidden"), keras.layers.Dense(1, name="out")]
        )
        generator = np.random.default_rng(0)
        model.set_weights([generator.normal(scale=0.1, size=w.shape) for w in model.get_weights()])
        # Keras itself wraps this optimizer in a LossScaleOptimizer.
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), **options)
        model.compile(optimizer, "mse")
        return [_snapshot(model, hvd.rank(), step) for step in range(STEPS)]
    finally:
        keras.config.set_dtype_policy(keras.config.floatx())


def _snapshot(model, rank, step):
    model.train_on_batch(*_batch(rank, step))
    return {
        "weights": np.concatenate([w.ravel() for w in model.get_weights()]),
        "scale": float(model.optimizer.dynamic_scale),
        "iterations": int(model.optimizer.iterations),
    }


def _check_steps(ranks, updates, skipped):
    """`updates`: the steps that end a cycle; `skipped`: the one among them that overflowed."""
    for rank in ranks:
        scales = [snapshot["scale"] for snapshot in rank]
        assert scales == [scales[0] if step < skipped else scales[0] / 2 for step in range(STEPS)]
        done = [step for step in updates if step != skipped]
        assert [s["iterations"] for s in rank] == [sum(d <= step for d in done) for step in range(STEPS)]
        for step in range(1, STEPS):
            moved = not np.array_equal(rank[step]["weights"], rank[step - 1]["weights"])
            assert moved == (step in done), f"step {step}"
        for mine, first in zip(rank, ranks[0], strict=True):
            np.testing.assert_array_equal(mine["weights"], first["weights"])
        assert np.all(np.isfinite(rank[-1]["weights"]))


def _run_local(hvd):
    """The overflow is in a gradient that is not exchanged."""
    shared = keras.Variable(np.zeros(2), dtype="float32", name="shared")
    local = keras.Variable(np.zeros(2), dtype="float32", name="local")
    inner = keras.optimizers.SGD(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(optimizer, select="shared")
    steps = []
    for step in range(3):
        overflows = hvd.rank() == 1 and step == 1
        gradients = [
            8 * tf.constant([hvd.rank() + 1.0, 0.0]),
            8 * tf.constant([1.0, np.inf if overflows else 2.0]),
        ]
        optimizer.apply(gradients, [shared, local])
        steps.append([shared.numpy(), local.numpy(), float(optimizer.dynamic_scale)])
    return steps


def _check_local(ranks):
    size = len(ranks)
    average = np.mean([rank + 1.0 for rank in range(size)])
    for steps in ranks:
        # Step 1 is skipped and halves the scale, so the last gradients count twice.
        for (shared, local, scale), (updates, expected_scale) in zip(
            steps, [(1, 8.0), (1, 4.0), (3, 4.0)], strict=True
        ):
            np.testing.assert_allclose(shared, [-average * updates, 0], rtol=1e-6)
            np.testing.assert_allclose(local, np.array([-1, -2]) * updates / size, rtol=1e-6)
            assert scale == expected_scale


PROGRAMS = {
    "overflow on one rank": Program(_train, lambda ranks: _check_steps(ranks, range(STEPS), BAD_STEP)),
    "overflow with accumulation": Program(
        lambda hvd: _train(hvd, backward_passes_per_step=2),
        lambda ranks: _check_steps(ranks, range(1, STEPS, 2), BAD_STEP),
    ),
    "overflow with fp16": Program(
        lambda hvd: _train(hvd, compression=hvd.Compression.fp16),
        lambda ranks: _check_steps(ranks, range(STEPS), BAD_STEP),
    ),
    "overflow in a local variable": Program(_run_local, _check_local),
}
