"""Ranks as threads train as one process with the whole batch; a part of the table of the real ranks."""

import keras
import pytest

from hvdext.gradients.exchange import GradientExchange
from hvdext.testing import run_ranks
from tests.multiprocess.programs import cases

NAMES = [
    "SGD",
    "Adam",
    "Lion",
    "MultiOptimizer",
    "accumulation summed, SGD",
    "accumulation averaged, RMSprop",
    "accumulation in Keras, SGD",
    "uneven last batch",
    "sparse as dense",
    "global_clipnorm",
    "custom loop, apply_gradients, eager",
]


@pytest.fixture(autouse=True)
def restored_precision():
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


# A Keras without MultiOptimizer has no case for it.
@pytest.mark.parametrize("name", [name for name in NAMES if name in cases.CASES])
@pytest.mark.slow
def test_three_threads_equal_one_process(name):
    case = cases.CASES[name]
    reference = cases.train_alone(case)
    cases.check(case, run_ranks(3, lambda comm: cases.train_shared(case)), reference)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.slow
def test_threads_in_other_numbers(size):
    case = cases.CASES["float32 SGD"]
    reference = cases.train_alone(case)
    cases.check(case, run_ranks(size, lambda comm: cases.train_shared(case)), reference)


@pytest.mark.slow
def test_one_rank_exchanges_nothing():
    case = cases.CASES["Adam"]
    reference = cases.train_alone(case)
    (alone,) = run_ranks(1, lambda comm: cases.train_shared(case))
    assert alone.pop("calls") == 0
    for key in ("weights", "optimizer"):
        for mine, wanted in zip(alone[key], reference[key], strict=True):
            assert (mine == wanted).all()


def _keep_own(self, gradients, *_):
    return list(gradients)


@pytest.mark.slow
def test_training_without_an_exchange_fails_the_comparison(monkeypatch):
    """The guard: should `DistributedOptimizer` stop exchanging, the tests above must fail."""
    case = cases.CASES["SGD"]
    reference = cases.train_alone(case)
    monkeypatch.setattr(GradientExchange, "combine", _keep_own)
    ranks = run_ranks(2, lambda comm: cases.train_shared(case))
    assert [rank["calls"] for rank in ranks] == [0, 0]
    counted = [rank | {"calls": case.updates * case.collectives} for rank in ranks]
    with pytest.raises(AssertionError):
        cases.check(case, counted, reference)
    first, second = [rank["weights"] for rank in ranks]
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(first, second, strict=True))
