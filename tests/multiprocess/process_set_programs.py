"""Process sets as the engine knows them; threads as ranks have none to register."""

from __future__ import annotations

from exchange_programs import Program, applied, assert_all, everyone, gradients_of, mean


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


PROGRAMS = {
    "unregistered process set": Program(_run_unregistered, _check_unregistered, sizes=(4,)),
    "process set of all ranks": Program(
        _run_all, lambda ranks: assert_all(ranks, mean(everyone(len(ranks)))), sizes=(2, 4)
    ),
}
