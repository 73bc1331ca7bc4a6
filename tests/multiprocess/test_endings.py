"""A rank that raises and a rank that never arrives: the whole job ends soon and says why."""

import re
import time

import pytest

from tests.multiprocess.launching.launch import launch

pytestmark = pytest.mark.multiprocess


def test_a_rank_that_raises_ends_the_job_with_its_traceback_first():
    ended = launch(2, "programs.endings:raising", timeout=90)
    now = time.time()
    assert ended.exit_code not in (0, None), ended.output
    raised = float(re.search(r"RAISED AT ([\d.]+)", ended.output).group(1))
    assert now - raised < 15
    lines = ended.output.splitlines()
    culprit = [i for i, line in enumerate(lines) if "ZeroDivisionError: the culprit's own error" in line]
    assert culprit, ended.output
    assert "[1]<stderr>" in lines[culprit[0]]
    # What the other rank sees is a consequence, and is printed after its cause.
    errors = [
        i for i, line in enumerate(lines) if line.startswith("[0]") and re.search("Error|Traceback", line)
    ]
    assert all(i > culprit[0] for i in errors), ended.output


@pytest.mark.parametrize("engine", ["repaired", "stall check off"])
def test_a_rank_that_never_arrives_is_named(engine):
    env = {"HVDEXT_DEADLINE": "6"}
    if engine == "stall check off":  # as on an engine whose check never fires
        env["HOROVOD_STALL_CHECK_DISABLE"] = "1"
    ended = launch(2, "programs.endings:sleeping", timeout=90, env=env)
    assert ended.exit_code not in (0, None), ended.output
    assert ended.seconds < 60  # the ranks' start included
    verdict = re.search(r"rank 0 has waited (\d+) s in collective '([\w.]+)', step (\d+)", ended.output)
    assert verdict, ended.output
    assert int(verdict.group(1)) < 15
    assert verdict.group(2) == "hvdext.grad.sgd.0"
    assert verdict.group(3) == "3"
    assert "rank 1 has not arrived: it has started this collective 2 times" in ended.output
