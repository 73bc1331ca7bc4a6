"""Files of pipelines: what plain Keras would have written, failures on all ranks, backups, cut layers."""

from __future__ import annotations

import json
import zipfile

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.failures import raise_on_all
from hvdext.keras_tools.custom_objects import fresh_copy
from hvdext.keras_tools.optimizers import build
from hvdext.placement.slices.uncut import compile_alike
from hvdext.testing import run_ranks
from tests.multiprocess.programs import pipeline_cases as cases

layers = keras.layers
FIT = {"batch_size": cases.ROWS, "shuffle": False, "verbose": 0}


def momentum():
    return keras.optimizers.SGD(0.05, momentum=0.9)


def compiled(model, optimizer=momentum, loss="mse", **options):
    model.compile(optimizer(), loss, run_eagerly=True, **options)
    return model


def piped(builder=cases.plain, grid=None, **options):
    plan = hvd.plan(builder, places=grid.shape.pipeline if grid else hvd.size())
    return compiled(hvd.pipeline(builder, plan, 2, grid=grid), **options)


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


@pytest.mark.slow
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
    compile_alike(twin, source, fresh_copy(source.optimizer))
    assert twin.get_compile_config() == source.get_compile_config()
    assert twin.optimizer is not source.optimizer
    scaled = fresh_copy(keras.optimizers.LossScaleOptimizer(mine()))
    assert type(scaled.inner_optimizer) is MyOptimizer


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="an older Keras")
def test_a_multi_optimizer_is_written_without_its_state(tmp_path):
    def chosen_by_function():
        member = keras.optimizers.SGD(0.1)
        return keras.optimizers.MultiOptimizer(lambda variable: member)

    def run(comm):
        model = piped(optimizer=chosen_by_function)
        model.fit(*cases.plain_data(1), **FIT)
        model.save(tmp_path / "multi.keras")
        model.save_weights(tmp_path / "multi.weights.h5")
        model.load_weights(tmp_path / "multi.weights.h5")
        return model.get_weights()

    with pytest.warns(UserWarning, match="state of a MultiOptimizer is not saved"):
        (weights,) = run_ranks(1, run)
    assert config_in(tmp_path / "multi.keras")["optimizer"]["class_name"] == "MultiOptimizer"
    opened = keras.models.load_model(tmp_path / "multi.keras", compile=False)
    assert_equal(opened.get_weights(), weights, 0)


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

    first, second = run_ranks(2, run)
    assert first[:3] == second[:3]
    assert "save of the pipeline 'plain' to" in first[0]
    assert "has failed:\n  rank 0: FileNotFoundError: " in first[0]
    assert "has failed:\n  rank 1: FileNotFoundError: " in first[3]
    assert "a file whose model was saved with the state of an optimizer" in first[4]


def test_a_failure_of_another_kind():
    def run(comm):
        raise_on_all(comm, None, "nothing", "hvdext.test.problem")
        with pytest.raises(RuntimeError, match="drawing has failed:\n  rank 1: KeyError: 'pen'"):
            raise_on_all(
                comm, KeyError("pen") if comm.rank == 1 else None, "drawing has failed", "hvdext.test.problem"
            )

    run_ranks(2, run)


# -- weights with the optimizer's state ----------------------------------------------------------------------


@pytest.mark.slow
def test_weights_hold_the_state_of_the_optimizer_as_in_keras(tmp_path):
    x, y = cases.plain_data(2)
    plain = compiled(cases.plain())
    plain.fit(x[:16], y[:16], **FIT)
    plain.save_weights(tmp_path / "plain.weights.h5")
    plain.fit(x[16:], y[16:], **FIT)
    path = tmp_path / "piped.weights.h5"

    def run(comm):
        model = piped()
        model.load_checkpoint(tmp_path / "plain.weights.h5")
        model.fit(x[16:], y[16:], **FIT)
        model.save_weights(path)
        before = state(model)
        model.fit(x, y, **FIT)
        model.load_weights(path)
        return before, state(model)

    for before, after in run_ranks(2, run):
        assert_equal(after, before, 0)
    again = compiled(cases.plain())
    again.optimizer.build(again.trainable_variables)
    again.load_weights(path)
    assert_equal(state(again), state(plain))

    def elsewhere(comm):
        model, remote = piped(), "ram://folder/piped.weights.h5"
        model.load_checkpoint(path)
        model.save_weights(remote)
        again = piped()
        again.load_checkpoint(remote)
        return state(again)

    assert_equal(run_ranks(1, elsewhere)[0], state(plain))

    def with_another(comm):
        model = piped(optimizer=keras.optimizers.Adam)
        model.load_weights(path)  # as in Keras: an optimizer that is not built gets nothing
        build(model.optimizer, model.trainable_variables)
        model.load_weights(path)
        return int(model.optimizer.iterations)

    with pytest.warns(UserWarning, match="The optimizer stays as it is"):
        assert run_ranks(1, with_another) == [0]


class Interrupted(Exception):
    """What ends a training early."""


def stopping_after(epochs):
    def stop(epoch, logs):
        if epoch + 1 == epochs:
            raise Interrupted

    return keras.callbacks.LambdaCallback(on_epoch_end=stop)


@pytest.mark.slow
def test_a_backup_resumes_as_if_nothing_had_happened(tmp_path):
    x, y = cases.plain_data(2)
    whole = compiled(cases.plain())
    whole.fit(x, y, epochs=3, **FIT)
    folder = tmp_path / "backup"

    def run(comm):
        backup = keras.callbacks.BackupAndRestore(folder, double_checkpoint=True)
        with pytest.raises(Interrupted):
            piped().fit(x, y, epochs=3, callbacks=[backup, stopping_after(2)], **FIT)
        comm.barrier("hvdext.test.interrupted")
        found = sorted(path.name for path in folder.iterdir())
        comm.barrier("hvdext.test.seen")
        model = piped()
        again = keras.callbacks.BackupAndRestore(folder)
        history = model.fit(x, y, epochs=3, callbacks=[again], **FIT)
        return found, history.epoch, cases.values(model), int(model.optimizer.iterations), folder.exists()

    results = run_ranks(2, run)
    weights = {}
    for found, epochs, values, steps, is_left in results:
        assert "latest.weights.h5" in found
        assert (epochs, steps, is_left) == ([2], 6, False)
        weights |= values
    for path, value in cases.values(whole).items():
        np.testing.assert_allclose(weights[path], value, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_backup_that_fails_fails_on_all_ranks(tmp_path):
    x, y = cases.plain_data(1)
    (tmp_path / "file").touch()

    def run(comm):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "file" / "folder")
        with pytest.raises(OSError, match=r"BackupAndRestore.on_epoch_end has failed:\n  rank 0"):
            piped().fit(x, y, callbacks=keras.callbacks.CallbackList([backup]), **FIT)
        differing = keras.callbacks.BackupAndRestore(tmp_path, save_freq=1 + comm.rank)
        with pytest.raises(ValueError, match="disagree about BackupAndRestore"):
            piped().fit(x, y, callbacks=differing, **FIT)

    run_ranks(2, run)


# -- pipelines of cut layers ---------------------------------------------------------------------------------


@cases.seeded
def uncut():
    x = keras.Input((6,), name="x")
    up, down = layers.Dense(8, "tanh", name="up")(x), layers.Dense(6, name="down")
    y = layers.Dropout(0.0, name="drop")(down(up))
    return keras.Model(x, layers.Dense(2, name="out")(layers.Dense(4, name="wide")(y)), name="cut")


def cut_by(grid):
    @cases.seeded
    def build():
        x = keras.Input((6,), name="x")
        up = hvd.ColumnDense(8, "tanh", gather=False, grid=grid, name="up")(x)
        y = hvd.RowDense(6, sliced_input=True, grid=grid, name="down")(up)
        y = layers.Dropout(0.0, name="drop")(y)
        y = hvd.ColumnDense(4, grid=grid, name="wide")(y)
        return keras.Model(x, layers.Dense(2, name="out")(y), name="cut")

    return build


@pytest.mark.slow
def test_a_pipeline_of_cut_layers_saves_and_loads_the_uncut_model(tmp_path):
    x, y = cases.plain_data(2)
    plain = compiled(uncut())
    plain.fit(x[:16], y[:16], **FIT)
    plain.save(tmp_path / "start.keras")
    plain.fit(x[16:], y[16:], **FIT)

    def run(comm):
        grid = hvd.Grid(pipeline=2, slices=2)
        model = piped(cut_by(grid), grid)
        model.load_checkpoint(tmp_path / "start.keras")
        model.fit(x[16:], y[16:], **FIT)
        model.save(tmp_path / "saved.keras")
        model.save_weights(tmp_path / "saved.weights.h5")
        before = state(model)
        model.fit(x, y, **FIT)
        model.load_weights(tmp_path / "saved.weights.h5")
        return before, state(model)

    for before, after in run_ranks(4, run):
        assert_equal(after, before, 0)
    text = zipfile.ZipFile(tmp_path / "saved.keras").read("config.json").decode()
    assert "hvdext" not in text
    opened = keras.models.load_model(tmp_path / "saved.keras")
    assert type(opened.get_layer("up")) is layers.Dense
    assert_equal(state(opened), state(plain))


def test_layers_cut_along_other_ranks_than_the_pipelines_slices():
    def run(comm):
        hvd.pipeline(cut_by(comm), hvd.plan(cut_by(comm), places=2), 2)

    with pytest.raises(ValueError, match="`grid` of cut layers must be that of the pipeline"):
        run_ranks(2, run)
