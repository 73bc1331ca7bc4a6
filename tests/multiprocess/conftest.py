"""One launch per number of ranks, shared by all tests that look at its results."""

from concurrent import futures

import pytest

from tests.multiprocess.launching.launch import launch

SLOWEST = 12  # programs that are named after a run
_ended = pytest.StashKey[dict]()


@pytest.fixture(scope="session")
def alone():
    """The launch of the references: beside the ranks, which leave some of the cores to it."""
    with futures.ThreadPoolExecutor(1) as thread:
        yield thread.submit(launch, 1, "launching.session:alone", timeout=480)


@pytest.fixture(scope="session")
def reference(alone):
    """Case name -> what plain Keras holds in the end."""
    ended = alone.result()
    assert ended.exit_code == 0, ended.output
    return ended.ranks[0]


@pytest.fixture(scope="session")
def sessions(pytestconfig, alone):
    """Number of ranks -> one dict of results per rank; launched when first asked for."""
    ended = pytestconfig.stash[_ended] = {}

    def session(size):
        if size not in ended:
            ended[size] = launch(size, "launching.session:on_ranks", timeout=900)
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


def pytest_terminal_summary(terminalreporter, config):
    """Says which programs took the most of each launch's time."""
    for size, session in config.stash.get(_ended, {}).items():
        if not session.ranks or session.ranks[0] is None:
            continue
        seconds = {name: result["seconds"] for name, result in session.ranks[0].items()}
        slowest = sorted(seconds, key=seconds.get, reverse=True)[:SLOWEST]
        terminalreporter.section(f"{size} ranks: slowest of {sum(seconds.values()):.0f} s")
        for name in slowest:
            terminalreporter.write_line(f"{seconds[name]:6.1f} s  {name}")
