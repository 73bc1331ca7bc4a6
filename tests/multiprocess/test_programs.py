"""Sums, Adasum, fp16, process sets, overflow, refusals and saved models, under horovodrun."""

import pytest

from tests.multiprocess.launching import session

pytestmark = pytest.mark.multiprocess


PAIRS = [(size, name) for size in (2, 4) for name in session.programs(size)]


@pytest.mark.parametrize(("size", "name"), PAIRS)
def test_program(size, name, results_of):
    session.programs(size)[name].check(results_of(size, name))


@pytest.mark.parametrize("size", [2, 4])
def test_fit_without_init_says_what_is_missing(size, results_of):
    for kind, message in results_of(size, "fit before init"):
        assert kind == "RuntimeError"
        assert "hvd.init()" in message
