"""Which launcher started a process: no process may train alone when several were started."""

import pytest

from hvdext.engine import launchers

MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1"}
SRUN = {"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "3"}
HOROVODRUN = {
    "HOROVOD_RANK": "0",
    "HOROVOD_SIZE": "2",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    "HOROVOD_CONTROLLER": "gloo",
}


@pytest.mark.parametrize(
    ("environ", "on_mpi", "number"),
    [
        ({}, False, 1),
        (HOROVODRUN, False, 2),
        (MPIRUN, True, 4),
        (SRUN, True, 3),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, True, 2),
        ({"PMIX_RANK": "5"}, True, 6),  # at least
        ({**SRUN, **HOROVODRUN}, False, 2),  # horovodrun inside srun
    ],
)
def test_who_started_this_process(environ, on_mpi, number):
    assert launchers.on_mpi(environ) is on_mpi
    assert launchers.started(environ) == number


def test_an_engine_without_mpi_is_refused_under_mpirun():
    message = r"\(mpirun\) started 4 processes.*build-horovod --with-mpi.*horovodrun -np 4"
    with pytest.raises(RuntimeError, match=message):
        launchers.check_engine(False, MPIRUN)
    with pytest.raises(RuntimeError, match=r"\(srun\) started 3"):
        launchers.check_engine(False, SRUN)

    launchers.check_engine(True, MPIRUN)
    launchers.check_engine(False, HOROVODRUN)
    launchers.check_engine(False, {"PMI_RANK": "0", "PMI_SIZE": "1"})  # a shell that srun started


def test_an_engine_of_another_mpi_is_refused():
    with pytest.raises(RuntimeError, match=r"started 4 processes.*joined 1 of"):
        launchers.check_size(1, MPIRUN)

    launchers.check_size(4, MPIRUN)
    launchers.check_size(2, HOROVODRUN)
