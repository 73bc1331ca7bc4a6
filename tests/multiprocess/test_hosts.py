"""The engine's collectives where not all ranks share memory, or none do: numbers, and bits alike on all."""

import pytest

from tests.multiprocess.launching.launch import launch
from tests.multiprocess.programs.engine_programs import SETS

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    ("env", "memory"),
    [
        ({"HVDEXT_LOCALS": "abab"}, "on within each of 2 hosts"),  # ranks not in the order of hosts
        ({"HVDEXT_LOCAL": "0"}, "off: HVDEXT_LOCAL=0"),
    ],
)
def test_collectives_of_groups_that_span_hosts(env, memory):
    ended = launch(4, "programs.engine_programs:elsewhere", timeout=240, env=env)
    assert ended.exit_code == 0, ended.output
    assert [rank["memory"] for rank in ended.ranks] == [memory] * 4
    for members in ([0, 1, 2, 3], *SETS):
        digests = {ended.ranks[rank]["digests"][str(members)] for rank in members}
        assert len(digests) == 1, members
