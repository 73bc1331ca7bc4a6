"""Process sets as the engine knows them; threads as ranks have none to register."""

from __future__ import annotations

from tests.multiprocess.programs.exchange_programs import (
    Program,
    applied,
    assert_all,
    everyone,
    gradients_of,
    mean,
)


def _run_unregistered(hvd):
    mine = hvd.ProcessSet([0, 1] if hvd.rank() < 2 else [2, 3])
    try:
        applied(hvd, gradients_of(0), process_set=mine)
    except ValueError as error:
        return str(error)
    return "no error"


def _check_unregistered(ranks):
    for rank, text in enumerate(ranks):
        assert "`process_set` must be registered" in text
        assert f"Received: ProcessSet({[0, 1] if rank < 2 else [2, 3]})" in text
        assert "registered: [[0, 1, 2, 3], [0, 2], [1, 3]]" in text


def _run_all(hvd):
    everybody = hvd.add_process_set(range(hvd.size()))
    return applied(hvd, gradients_of(hvd.rank()), process_set=everybody)


def _run_global(hvd):
    return applied(hvd, gradients_of(hvd.rank()), process_set=hvd.global_process_set)


def _run_numbers(hvd):
    """The sets that the session has registered, and one that it has not."""
    import horovod.tensorflow as engine

    known = engine.mpi_ops._basics._get_process_set_ids_and_ranks()
    sets = [hvd.ProcessSet(ranks) for ranks in ([2, 0], [1, 3], [0, 1], [3, 2, 1, 0])]
    return {
        "numbers": [s.process_set_id for s in sets],
        "engine's ranks": [sorted(known.get(s.process_set_id, [])) for s in sets],
        "included": [s.included() for s in sets],
        "global": [hvd.global_process_set.process_set_id, hvd.global_process_set.rank()],
        "removed": [hvd.remove_process_set(sets[2]), hvd.remove_process_set(hvd.global_process_set)],
        "static": _error(lambda: hvd.remove_process_set(sets[0]))
        + _error(lambda: hvd.add_process_set([0, 1])),
    }


def _check_numbers(ranks):
    for rank, result in enumerate(ranks):
        assert result["numbers"][2:] == [None, 0]
        assert result["engine's ranks"] == [[0, 2], [1, 3], [], [0, 1, 2, 3]]
        assert result["included"] == [rank in (0, 2), rank in (1, 3), rank in (0, 1), True]
        assert result["global"] == [0, rank]
        assert result["removed"] == [False, False]
        for received in ("[0, 2]", "[0, 1]"):
            assert f"`hvd.init(process_sets='dynamic')`. Received: ProcessSet({received})" in result["static"]


def _error(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


PROGRAMS = {
    "global process set": Program(
        _run_global, lambda ranks: assert_all(ranks, mean(everyone(len(ranks)))), sizes=(2, 4)
    ),
    "numbers of process sets": Program(_run_numbers, _check_numbers, sizes=(4,)),
    "unregistered process set": Program(_run_unregistered, _check_unregistered, sizes=(4,)),
    "process set of all ranks": Program(
        _run_all, lambda ranks: assert_all(ranks, mean(everyone(len(ranks)))), sizes=(2, 4)
    ),
}
