"""One launch per number of ranks, shared by all tests that look at its results."""

import pytest
from launch import launch


@pytest.fixture(scope="session")
def reference():
    """Case name -> what plain Keras holds in the end."""
    ended = launch(1, "session:alone", timeout=240)
    assert ended.exit_code == 0, ended.output
    return ended.ranks[0]


@pytest.fixture(scope="session")
def sessions():
    """Number of ranks -> one dict of results per rank; launched when first asked for."""
    ended = {}

    def session(size):
        if size not in ended:
            ended[size] = launch(size, "session:on_ranks", timeout=900)
        assert ended[size].exit_code == 0, ended[size].output
        return ended[size].ranks

    return session


@pytest.fixture
def results_of(sessions):
    """(size, name) -> what that program returned on each rank, in rank order."""

    def results_of(size, name):
        results = [rank[name] for rank in sessions(size)]
        for number, result in enumerate(results):
            assert "error" not in result, f"rank {number}: {result['error']}"
        return [result["value"] for result in results]

    return results_of
