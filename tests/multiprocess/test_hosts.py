"""The engine's collectives where not all ranks share memory, or none do: numbers, and bits alike on all."""

import pytest

from tests.multiprocess.launching.launch import launch, launch_on_two_hosts
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
    _check(launch(4, "programs.engine_programs:elsewhere", timeout=240, env=env), memory)


def test_collectives_of_two_hosts_of_two_ranks():
    """Each a namespace of its own network and processes, as containers have; all talk through one device."""
    ended = launch_on_two_hosts(2, "programs.engine_programs:elsewhere", timeout=240)
    if ended.output.startswith("no two hosts: "):
        pytest.skip(ended.output)
    _check(ended, "on within each of 2 hosts")


def _check(ended, memory):
    assert ended.exit_code == 0, ended.output
    assert [rank["memory"] for rank in ended.ranks] == [memory] * 4
    for members in ([0, 1, 2, 3], *SETS):
        digests = {ended.ranks[rank]["digests"][str(members)] for rank in members}
        assert len(digests) == 1, members
