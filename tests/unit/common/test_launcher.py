"""Which launcher started a process: no process may train alone when several were started."""

import pytest

from hvdext.common import launcher

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
    assert launcher.on_mpi(environ) is on_mpi
    assert launcher.started(environ) == number


def test_an_engine_without_mpi_is_refused_under_mpirun():
    message = r"\(mpirun\) started 4 processes.*build-horovod --with-mpi.*horovodrun -np 4"
    with pytest.raises(RuntimeError, match=message):
        launcher.check_engine(False, MPIRUN)
    with pytest.raises(RuntimeError, match=r"\(srun\) started 3"):
        launcher.check_engine(False, SRUN)

    launcher.check_engine(True, MPIRUN)
    launcher.check_engine(False, HOROVODRUN)
    launcher.check_engine(False, {"PMI_RANK": "0", "PMI_SIZE": "1"})  # a shell that srun started


def test_an_engine_of_another_mpi_is_refused():
    with pytest.raises(RuntimeError, match=r"started 4 processes.*joined 1 of"):
        launcher.check_size(1, MPIRUN)

    launcher.check_size(4, MPIRUN)
    launcher.check_size(2, HOROVODRUN)


def test_where_a_rank_stands():
    assert launcher.rank_info({}) == launcher.RankInfo()
    gloo = {
        "HOROVOD_RANK": "3",
        "HOROVOD_SIZE": "4",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "99",
    }
    assert launcher.rank_info(gloo) == launcher.RankInfo(3, 4, 1, 2, "10.0.0.1:99")
    assert not launcher.rank_info(gloo).one_host
    mpi = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    assert launcher.rank_info(mpi) == launcher.RankInfo(1, 2, 1, 2, None)
    with pytest.raises(ValueError, match=r"HOROVOD_RANK must be a whole number. Received: 'x'"):
        launcher.rank_info({"HOROVOD_RANK": "x"})
    with pytest.raises(ValueError, match="below its number of ranks"):
        launcher.rank_info({"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"})


@pytest.mark.parametrize(
    ("environ", "launched", "told"),
    [
        ({}, False, None),
        (HOROVODRUN, True, 2),
        (MPIRUN, True, 4),
        (SRUN, True, 3),
        ({"SLURM_STEP_NUM_TASKS": "3"}, False, None),  # a batch script: nobody joins its processes
        ({"PMIX_RANK": "5"}, True, None),
        ({**MPIRUN, **HOROVODRUN}, True, 2),  # the outer mpirun's number is not this job's
    ],
)
def test_how_many_a_launcher_tells(environ, launched, told):
    assert launcher.launched(environ) is launched
    assert launcher.told_size(environ) == told
