"""Kill a rank in the middle of a DiLoCo round, start again: as if nothing had happened."""

import pytest

from tests.multiprocess.launching.launch import launch

pytestmark = pytest.mark.multiprocess


def test_a_killed_run_resumes_in_the_middle_of_a_round(tmp_path):
    env = {"RESUME_FOLDER": str(tmp_path)}
    killed = launch(2, "programs.resuming:straight", timeout=180, env=env)
    assert killed.exit_code not in (0, None), killed.output
    ended = launch(2, "programs.resuming:resumed", timeout=180, env=env)
    assert ended.exit_code == 0, ended.output
    for first_epoch, to_the_straight_run, _ in ended.ranks:
        assert first_epoch == 2
        assert to_the_straight_run == 0.0
    # 20 steps: the last round began at 14, and the ranks have gone their own ways since.
    assert ended.ranks[0][2] > 1e-3
