"""How the output of the two ranks is judged."""

import pytest

from hvdext.engine.probe import read_result

GOOD = '[0]<stdout>:hvdext-probe {"size": 2, "sum": [3.0, 30.0]}\n'


def test_the_right_sum_is_ok():
    result = read_result("[1]<stderr>:noise\n" + GOOD, 0, 4.0)

    assert result.ok
    assert result.seconds == 4.0
    assert result.detail == "size 2, sum [3.0, 30.0]; shared memory not told"


def test_it_tells_of_shared_memory():
    line = GOOD.replace('"sum"', '"shared memory": "off: HVDEXT_LOCAL=0", "sum"')

    assert read_result(line, 0, 4.0).detail.endswith("shared memory off: HVDEXT_LOCAL=0")


def test_mpirun_may_add_a_rank_at_the_end_of_the_line():
    assert read_result(GOOD.replace("[0]", "[1,0]").rstrip() + "[1,0]<stdout>:\n", 0, 4.0).ok


@pytest.mark.parametrize("found", ['{"size": 1, "sum": [1.0, 10.0]}', '{"size": 2, "sum": [1, 1]}'])
def test_a_wrong_sum_is_not_ok(found):
    result = read_result(f"[0]<stdout>:hvdext-probe {found}", 0, 4.0)

    assert not result.ok
    assert "expected size 2 and sum [3.0, 30.0]" in result.detail


def test_a_failed_job_shows_its_last_lines():
    result = read_result("first\n" * 50 + "the cause\n", 1, 4.0)

    assert not result.ok
    assert "exit code 1" in result.detail
    assert result.detail.endswith("the cause")


def test_a_job_that_fails_after_the_sum_is_not_ok():
    assert not read_result(GOOD, 1, 4.0).ok
