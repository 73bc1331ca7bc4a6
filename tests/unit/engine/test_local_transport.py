"""Ranks that share memory, as processes of a C++ program: numbers, and ranks that end, stop or go astray."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hvdext.engine import fixes

SOURCES = Path(fixes.__file__).parent / "local"
COMPILER = os.environ.get("CXX", "g++")

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    made = tmp_path_factory.mktemp("local") / "local_ranks"
    names = ("local_transport.cc", "doorbell.cc")
    files = [Path(__file__).parent / "local_ranks.cc", *(SOURCES / name for name in names)]
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", "-pthread"]
    subprocess.run([COMPILER, *options, "-o", made, *files], check=True, timeout=120)
    return made


def run(program, *arguments, **variables):
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | variables,
    )
    return done.returncode, sorted(done.stdout.splitlines())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_collective_is_that_of_one_process(program, size):
    assert run(program, "collectives", size) == (0, [f"rank {rank}: equal" for rank in range(size)])


def test_a_rank_that_is_killed_at_any_moment_is_named(program):
    code, lines = run(program, "killed", 3, 200)
    assert code == 0, lines
    assert len(lines) == 2 * 200
    assert all("Rank 2 (process " in line and "has ended" in line for line in lines), lines


def test_a_rank_that_stops_is_named_at_the_deadline(program):
    code, lines = run(program, "frozen", 3)
    assert code == 0
    for rank, line in enumerate(lines):
        assert line.startswith(f"rank {rank}: Rank 2 (process ")
        assert f"has not come: rank {rank} waited for it in barrier, at most 1500 ms" in line


def test_a_rank_that_leaves_wakes_those_that_wait(program):
    code, lines = run(program, "gone", 2)
    assert code == 0
    assert "has ended" in lines[0]
    assert "in barrier" in lines[0]


def test_ranks_in_different_collectives_get_an_error(program):
    code, lines = run(program, "elsewhere", 2)
    assert code == 0
    assert len(lines) == 2
    for line in lines:
        assert "barrier of 0 bytes" in line
        assert "broadcast of 5 bytes" in line


def test_a_rank_that_waits_for_other_hosts_is_waited_for(program):
    code, lines = run(program, "away", 3)
    assert (code, lines) == (0, [f"rank {rank}: no error" for rank in range(3)])


def test_ranks_share_memory_with_those_of_their_host(program):
    """Five ranks on three hosts, not in the order of hosts: each sums the ranks of its own."""
    code, lines = run(program, "hosts", 5, "abacb")
    assert code == 0
    assert lines == [
        "rank 0: host 0, place 0 of 2, sum 2",
        "rank 1: host 1, place 0 of 2, sum 5",
        "rank 2: host 0, place 1 of 2, sum 2",
        "rank 3: host 2, place 0 of 1, sum 3",
        "rank 4: host 1, place 1 of 2, sum 5",
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
@pytest.mark.parametrize(("cores", "how"), [("01", "spins"), ("00", "sleeps")])
def test_ranks_that_are_bound_to_a_core_each_have_enough_of_them(program, cores, how):
    assert run(program, "bound", 2, cores) == (0, [f"rank {rank}: {how}" for rank in range(2)])


def test_many_more_ranks_than_processors(program):
    code, lines = run(program, "hosts", 64, 64 * "a")
    assert code == 0
    total = sum(range(64))
    assert lines == sorted(f"rank {rank}: host 0, place {rank} of 64, sum {total}" for rank in range(64))


@pytest.mark.parametrize(
    ("names", "why"), [("abc", "every rank has a HVDEXT_LOCAL of its own"), ("aa0", "HVDEXT_LOCAL=0")]
)
def test_all_or_nobody(program, names, why):
    code, lines = run(program, "hosts", 3, names)
    assert code != 0
    assert lines == [f"rank {rank}: off: {why}" for rank in range(3)]


def test_memory_of_a_stranger_is_not_taken_for_a_rank_s(program):
    """In containers with one view of processes each, a number may be another process here."""
    code, lines = run(program, "stranger", 3)
    assert code != 0
    assert [re.sub(r"\d+ of", "N of", line) for line in lines] == [
        "rank 0: off: process N of this host is not the rank that has this number elsewhere",
        "rank 1: off: process N of this host is not the rank that has this number elsewhere",
        "rank 2: off: another rank cannot",
    ]


def test_it_can_be_turned_off(program):
    code, lines = run(program, "collectives", 2, HVDEXT_LOCAL="0")
    assert code != 0
    assert lines == [f"rank {rank}: off: HVDEXT_LOCAL=0" for rank in range(2)]
