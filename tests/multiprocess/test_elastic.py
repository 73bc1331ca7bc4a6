"""A rank is lost and another one comes: the training ends as the definition says."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.multiprocess.launching.launch import launch_elastic
from tests.multiprocess.programs import elastic_job

pytestmark = pytest.mark.multiprocess


def test_training_goes_on_from_the_last_commit_and_takes_in_a_new_rank(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    script = Path(elastic_job.__file__)
    ended = launch_elastic(hosts, script, str(hosts), timeout=150)
    assert ended.exit_code == 0, ended.output
    assert re.search(r"\[1\].*Killed|exit with status code 137", ended.output)
    survivor, newcomer = ended.ranks

    # The third batch of the second epoch was trained and lost with its rank; it is done again, alone.
    together = [[0, s, 2] for s in range(4)] + [[1, 0, 2], [1, 1, 2]]
    alone = [[1, 2, 1], [1, 3, 1]]
    assert survivor["history"] == together + alone + [[2, s, 2] for s in range(4)]
    assert survivor["born as"] == [0, 2]
    assert survivor["resets"] == [1, 2]
    assert newcomer["resets"] == []
    kernel, bias = elastic_job.effective_weights(survivor["history"])
    for rank in ended.ranks:
        assert rank["outcome"] == "trained"
        assert (rank["epoch"], rank["batch"], rank["iterations"]) == (3, 0, 12)
        assert rank["history"] == survivor["history"]
        np.testing.assert_allclose(rank["kernel"], kernel, rtol=1e-5)
        np.testing.assert_allclose(rank["bias"], [bias], rtol=1e-5)
        assert rank["difference"] == 0
    # What is checked above can tell the difference.
    never_lost, _ = elastic_job.effective_weights([(e, s, 2) for e in range(3) for s in range(4)])
    assert np.abs(never_lost - kernel).max() > 1e-3
