"""Rank 0 saves what all ranks have trained; a process without hvdext and Horovod goes on with it."""

from __future__ import annotations

import importlib.abc
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program

STEPS = 4  # before saving
ROWS = 12


class _Forbidden(importlib.abc.MetaPathFinder):
    """Makes this process one where hvdext and Horovod are not installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("hvdext", "horovod"):
            raise ImportError(f"{fullname} is not installed here")


def forbid_hvdext() -> None:
    """From now on, importing hvdext or Horovod fails."""
    assert "hvdext" not in sys.modules
    assert "horovod" not in sys.modules
    sys.meta_path.insert(0, _Forbidden())


def batch(step: int, rank: int = 0, size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """This rank's rows of a batch."""
    generator = np.random.default_rng([3, step])
    x = generator.normal(size=(ROWS, 4)).astype("float32")
    return x[rank::size], np.sin(x.sum(axis=1, keepdims=True))[rank::size]


def make_model(optimizer) -> keras.Model:
    """A compiled model, the same in every process."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh", name="hidden"),
            keras.layers.Dense(1, name="out"),
        ]
    )
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(size=weight.shape) for weight in model.get_weights()])
    model.compile(optimizer, "mse")
    return model


def plain_adam() -> keras.optimizers.Optimizer:
    return keras.optimizers.Adam(0.05, epsilon=0.1)


def train_and_save(hvd, folder: Path, **options) -> dict:
    """Trains `STEPS` steps on this rank's rows; rank 0 saves in all formats."""
    model = make_model(hvd.DistributedOptimizer(plain_adam(), **options))
    for step in range(STEPS):
        model.train_on_batch(*batch(step, hvd.rank(), hvd.size()))
    if hvd.rank() == 0:
        model.save(folder / "model.keras")
        model.save_weights(folder / "model.weights.h5")
        model.export(folder / "exported", verbose=False)
        tf.saved_model.save(model, str(folder / "saved_model"))
    return state(model)


def state(model) -> dict:
    """Everything that training has changed, and what the model says."""
    return {
        "weights": model.get_weights(),
        "optimizer": [variable.numpy() for variable in model.optimizer.variables],
        "says": model(batch(99)[0]).numpy(),
    }


def reopen(folder: Path) -> dict:
    """What plain Keras finds in `folder`, and where one more step on a whole batch leads it."""
    forbid_hvdext()
    model = keras.models.load_model(folder / "model.keras")
    found = state(model)
    kind = f"{type(model.optimizer).__module__}.{type(model.optimizer).__qualname__}"

    weights_only = make_model(plain_adam())
    weights_only.optimizer.build(weights_only.trainable_variables)
    weights_only.load_weights(folder / "model.weights.h5")

    exported = tf.saved_model.load(str(folder / "exported"))
    saved = tf.saved_model.load(str(folder / "saved_model"))
    x = tf.constant(batch(99)[0])
    says = {
        "exported": exported.serve(x).numpy(),
        "saved_model": next(iter(saved.signatures["serving_default"](x).values())).numpy(),
    }
    model.train_on_batch(*batch(STEPS))
    config = model.optimizer.get_config()
    return {
        "kind": kind,
        "epsilon": config["epsilon"],
        "found": found,
        "found in weights": state(weights_only),
        "says": says,
        "next": state(model),
    }


def plain_training() -> dict:
    """The same training in plain Keras, from the start and one step further."""
    model = make_model(plain_adam())
    for step in range(STEPS + 1):
        model.train_on_batch(*batch(step))
    return state(model)


def reopen_and_compare() -> dict:
    """Run in a process of its own, on the folder TEST_SAVED."""
    import os

    return {"reopened": reopen(Path(os.environ["TEST_SAVED"])), "plain": plain_training()}


def check_reopened(saved: dict, reopened: dict, plain: dict) -> None:
    """`saved`: the state of the rank that saved."""
    assert reopened["kind"] == "keras.src.optimizers.adam.Adam"
    assert reopened["epsilon"] == 0.1
    _assert_equal(reopened["found"], saved, exactly=True)
    _assert_equal(reopened["found in weights"], saved, exactly=True)
    assert len(saved["optimizer"]) == 2 + 2 * 4  # iterations, learning rate, two moments of four weights
    assert saved["optimizer"][0] == STEPS
    for says in reopened["says"].values():
        np.testing.assert_allclose(says, saved["says"], rtol=1e-6, atol=1e-6)
    _assert_equal(reopened["next"], plain, exactly=False)


def _assert_equal(one, other, exactly):
    for key in ("weights", "optimizer", "says"):
        for a, b in zip(one[key], other[key], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if exactly else 2e-6)


def _run(hvd):
    with tempfile.TemporaryDirectory() as folder:
        trained = train_and_save(hvd, Path(folder))
        # A process of its own, which rank 0 starts.
        return {"trained": trained, "after": _in_plain_process(folder) if hvd.rank() == 0 else None}


def _in_plain_process(folder):
    from tests.multiprocess.launching.launch import launch

    target, env = "programs.saving_programs:reopen_and_compare", {"TEST_SAVED": str(folder)}
    ended = launch(1, target, timeout=90, env=env)
    return ended.ranks[0] or {"error": ended.output}


def _check(ranks):
    after = ranks[0]["after"]
    assert "error" not in after, after["error"]
    for rank in ranks[1:]:
        _assert_equal(rank["trained"], ranks[0]["trained"], exactly=True)
    check_reopened(ranks[0]["trained"], after["reopened"], after["plain"])


PROGRAMS = {"saved by rank 0": Program(_run, _check, sizes=(2,))}
