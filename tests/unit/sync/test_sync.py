"""Rules and schedules with ranks as threads, against the simulation in NumPy."""

import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.sync.engine import fragment
from hvdext.testing import run_ranks
from tests.multiprocess.programs import sync_programs

pytestmark = pytest.mark.filterwarnings("ignore:The ranks start from different weights")

# Two are real ranks: tests/multiprocess.
RUNS = [(name, size) for name, case in sync_programs.CASES.items() for size in case.sizes if size > 2]


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch):
    """Building graphs would take most of the time; the runs under horovodrun build them."""
    tf.config.run_functions_eagerly(True)
    monkeypatch.setattr(fragment.Traced, "__call__", lambda traced, *args: traced._function(*args))
    yield
    tf.config.run_functions_eagerly(False)


def _play(case, size):
    ranks = run_ranks(size, lambda comm: sync_programs.play(case, case.sync(hvd.sync), comm.rank))
    sync_programs.check(case, ranks)


@pytest.mark.parametrize(("name", "size"), RUNS)
@pytest.mark.slow
def test_equals_the_simulation(name, size):
    _play(sync_programs.CASES[name], size)


@pytest.mark.parametrize(("number", "name"), list(enumerate(sync_programs.STREAMING)))
@pytest.mark.slow
def test_streaming_diloco_equals_the_simulation(number, name):
    """With 2, 3 and 4 ranks in turn."""
    _play(sync_programs.STREAMING[name], 2 + number % 3)
