"""N ranks train as one process with the whole batch: every optimizer, every option, under horovodrun."""

import inspect

import keras
import numpy as np
import pytest

from tests.multiprocess.programs import cases

pytestmark = pytest.mark.multiprocess
PAIRS = [(size, name) for size in (2, 4) for name, case in cases.CASES.items() if size in case.sizes]


def test_every_optimizer_of_keras_is_in_the_table():
    known = {
        name
        for name, value in vars(keras.optimizers).items()
        if inspect.isclass(value) and issubclass(value, keras.optimizers.Optimizer)
    }
    assert known - {"Optimizer"} == {name for name in cases.OPTIMIZERS if hasattr(keras.optimizers, name)}


@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_ranks_equal_one_process_with_the_whole_batch(size, name, results_of, reference):
    assert "error" not in reference[name], reference[name]["error"]
    cases.check(cases.CASES[name], results_of(size, name), reference[name]["value"])


def test_the_comparison_would_notice_ranks_that_train_on_their_own(results_of, reference):
    """Ten steps on one rank's rows alone lead somewhere else, far beyond every tolerance."""
    case = cases.CASES["SGD"]
    keras.config.set_floatx(case.floatx)
    try:
        alone = cases.train_on_share_alone(case, rank=0, size=2)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
    together = reference["SGD"]["value"]["weights"]
    assert all(
        np.max(np.abs(mine - np.asarray(ours))) > 1e-3
        for mine, ours in zip(alone["weights"], together, strict=True)
    )
