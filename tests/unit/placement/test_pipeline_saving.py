"""Files of pipelines: what plain Keras would have written, failures on all ranks."""

from __future__ import annotations

import json
import zipfile

import keras
import numpy as np
import pipeline_cases as cases
import pytest

import hvdext as hvd
from hvdext.placement.plain import compile_alike, renewed
from hvdext.placement.together import raise_together
from hvdext.testing import run_ranks

layers = keras.layers
FIT = {"batch_size": cases.ROWS, "shuffle": False, "verbose": 0}


def momentum():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compiled(model, optimizer=momentum, loss="mse", **options):
    model.compile(optimizer(), loss, run_eagerly=True, **options)
    return model


def piped(builder=cases.plain, **options):
    return compiled(hvd.pipeline(builder, hvd.plan(builder, places=hvd.size()), 2), **options)


def state(model):
    """All that a file holds of a model."""
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]]


def assert_equal(found, expected, tolerance=1e-6):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


def config_in(path):
    """The compile configuration in a file, without names that Keras numbers."""
    return json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"]


# -- losses and optimizers that Keras cannot find by name ---------------------------------------------------


def my_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


class MyMetric(keras.metrics.MeanAbsoluteError):
    """A user's, not registered."""


class MySchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A user's, not registered."""

    def __call__(self, step):
        return 0.1

    def get_config(self):
        return {}


class MyOptimizer(keras.optimizers.SGD):
    """A user's, not registered."""


def mine():
    return MyOptimizer(MySchedule(), momentum=0.9, name="mine")


def test_what_keras_cannot_find_by_name_is_saved_as_keras_saves_it(tmp_path):
    x, y = cases.plain_data(1)
    options = {"optimizer": mine, "loss": my_loss, "metrics": [my_loss, MyMetric(name="m")]}
    plain = compiled(cases.plain(), **options)
    plain.fit(x, y, **FIT)
    plain.save(tmp_path / "plain.keras")

    def run(comm):
        model = piped(**options)
        model.fit(x, y, **FIT)
        model.save(tmp_path / "piped.keras")

    run_ranks(2, run)
    assert config_in(tmp_path / "piped.keras") == config_in(tmp_path / "plain.keras")
    scope = {c.__name__: c for c in (my_loss, MyMetric, MySchedule, MyOptimizer)}
    opened = keras.models.load_model(tmp_path / "piped.keras", custom_objects=scope)
    assert_equal(state(opened), state(plain))


def test_compiled_alike_keeps_what_the_user_gave():
    source, twin = cases.plain(), cases.plain()
    source.compile("adam", my_loss, metrics=["mae"], loss_weights=[2.0])
    compile_alike(twin, source)
    assert twin.get_compile_config() == source.get_compile_config()
    assert twin.optimizer is not source.optimizer
    scaled = renewed(keras.optimizers.LossScaleOptimizer(mine()))
    assert type(scaled.inner_optimizer) is MyOptimizer


# -- failures ------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_written_or_read_fail_on_all_ranks(tmp_path):
    nowhere = tmp_path / "nowhere"
    other = tmp_path / "other.weights.h5"
    keras.Sequential([keras.Input((6,)), layers.Dense(8)]).save_weights(other)

    def run(comm):
        model = piped()
        here = tmp_path / f"only{comm.rank}.weights.h5"
        if comm.rank == 0:
            cases.plain().save_weights(here)
        actions = [
            (OSError, lambda: model.save(nowhere / "model.keras")),
            (OSError, lambda: model.save_weights(nowhere / "model.weights.h5")),
            (ValueError, lambda: model.save("model.unknown")),
            (OSError, lambda: model.load_weights(here)),
            (ValueError, lambda: model.load_checkpoint(here)),
            (ValueError, lambda: model.load_weights(other)),
            (ValueError, lambda: model.load_weights("model.unknown")),
        ]
        messages = []
        for kind, action in actions:
            with pytest.raises(kind) as error:
                action()
            messages.append(str(error.value).replace(str(here), "here"))
        return messages

    first, second = run_ranks(2, run, timeout=20)
    assert first[:3] == second[:3]
    assert "save of the pipeline 'plain' to" in first[0]
    assert "has failed on rank 0: FileNotFoundError: " in first[0]
    assert "has failed on rank 1: FileNotFoundError: " in first[3]
    assert "a file whose model was saved with the state of an optimizer" in first[4]


def test_a_failure_of_another_kind():
    def run(comm):
        raise_together(comm, "nothing", None)
        with pytest.raises(RuntimeError, match="drawing has failed on rank 1: KeyError: 'pen'"):
            raise_together(comm, "drawing", KeyError("pen") if comm.rank == 1 else None)

    run_ranks(2, run)
