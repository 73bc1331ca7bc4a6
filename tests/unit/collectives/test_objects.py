"""`hvd.broadcast_object` and `hvd.allgather_object`."""

import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.testing import run_ranks
from tests.multiprocess.programs import collective_programs


@pytest.mark.parametrize("size", [2, 3])
def test_objects_travel(size):
    program = collective_programs.PROGRAMS["objects"]
    program.check(run_ranks(size, lambda comm: program.run(hvd)))


def test_alone_the_object_comes_back():
    with use(SoloComm()):
        value = {"a": 1}
        assert hvd.broadcast_object(value) is value
        assert hvd.allgather_object(value) == [value]


@pytest.mark.parametrize("function", [hvd.broadcast_object, hvd.allgather_object])
def test_refusals(function):
    with use(SoloComm()):
        with pytest.raises(ValueError, match=r"`session` must be None.*drop the argument"):
            function(1, session=object())
        with pytest.raises(ValueError, match="`name` must be a string"):
            function(1, name="")
        with pytest.raises(RuntimeError, match=r"outside of tf\.function"):
            tf.function(lambda: function(1))()
        with pytest.raises(TypeError, match="Did you mean `name`"):
            function(1, nane="x")
        with pytest.raises(ValueError, match="must contain the rank"):
            function(1, process_set=hvd.ProcessSet([1]))


def test_a_root_that_does_not_exist():
    with use(SoloComm()), pytest.raises(ValueError, match=r"`root_rank` must be one of the ranks \[0\]"):
        hvd.broadcast_object(1, root_rank=1)
