"""Models trained with hvdext open where neither hvdext nor Horovod can be imported."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from tests.multiprocess.launching.launch import launch
from tests.multiprocess.programs import saving_programs


@pytest.mark.slow
def test_saved_models_open_in_plain_keras(tmp_path):
    with use(SoloComm()):
        trained = saving_programs.train_and_save(hvd, tmp_path)
    target, env = "programs.saving_programs:reopen_and_compare", {"TEST_SAVED": str(tmp_path)}
    ended = launch(1, target, timeout=120, env=env)
    assert ended.exit_code == 0, ended.output
    (after,) = ended.ranks
    saving_programs.check_reopened(trained, after["reopened"], after["plain"])


@pytest.mark.slow
def test_accumulated_gradients_are_not_saved(tmp_path):
    """A model saved within a cycle holds the plain optimizer's variables and no others."""
    with use(SoloComm()):
        optimizer = hvd.DistributedOptimizer(saving_programs.plain_adam(), backward_passes_per_step=2)
        model = saving_programs.make_model(optimizer)
        for step in range(3):
            model.train_on_batch(*saving_programs.batch(step))
        model.save(tmp_path / "model.keras")
        reopened = keras.models.load_model(tmp_path / "model.keras")
    assert type(reopened.optimizer) is keras.optimizers.Adam
    assert int(reopened.optimizer.iterations) == 1
    expected = [v.numpy() for v in model.optimizer.variables]
    assert len(reopened.optimizer.variables) == len(expected) == 2 + 2 * 4
    for variable, wanted in zip(reopened.optimizer.variables, expected, strict=True):
        np.testing.assert_array_equal(variable.numpy(), wanted)


def test_a_reopened_optimizer_can_be_distributed(tmp_path):
    with use(SoloComm()):
        model = saving_programs.make_model(hvd.DistributedOptimizer(saving_programs.plain_adam()))
        model.train_on_batch(*saving_programs.batch(0))
        model.save(tmp_path / "model.keras")
        reopened = keras.models.load_model(tmp_path / "model.keras")
        assert hvd.DistributedOptimizer(reopened.optimizer) is reopened.optimizer
        for one in (model, reopened):
            one.train_on_batch(*saving_programs.batch(1))
    for one, other in zip(model.get_weights(), reopened.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_clone_is_plain():
    optimizer = hvd.DistributedOptimizer(saving_programs.plain_adam())
    clone = keras.optimizers.Adam.from_config(optimizer.get_config())
    hvd.DistributedOptimizer(clone)  # would raise if it were distributed already
