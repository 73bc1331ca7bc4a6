"""Copies of a fork server are ranks like any others."""

import os

import pytest

from tests.multiprocess.launching.launch import launch

pytestmark = pytest.mark.multiprocess


def test_ranks_that_are_copies():
    target = "programs.copies:describe"
    first, second = (launch(4, target, timeout=120, env={"TEST_ASKED_BY": by}) for by in "ab")
    for ended, by in ((first, "a"), (second, "b")):
        assert ended.exit_code == 0, ended.output
        assert [rank["rank"] for rank in ended.ranks] == [0, 1, 2, 3]
        for rank in ended.ranks:
            assert rank["arguments"] == [target]
            assert rank["asked by"] == by
            assert rank["folder"] == os.getcwd()
            assert rank["engine"] == []
        assert ended.ranks[0]["hash"] != ended.ranks[1]["hash"]  # sets are in another order
    for what in (0, 1):
        assert len({rank["random"][what] for ended in (first, second) for rank in ended.ranks}) == 8
    assert len({rank["process"] for ended in (first, second) for rank in ended.ranks}) == 8
