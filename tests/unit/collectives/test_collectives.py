"""The collectives for users, with threads as ranks and alone; their arguments."""

import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.testing import run_ranks
from tests.multiprocess.programs import collective_programs

PAIRS = [
    (3 if 3 in program.sizes else program.sizes[-1], name)
    for name, program in collective_programs.PROGRAMS.items()
    if name not in ("objects", "batch normalization")
]


@pytest.mark.parametrize(("size", "name"), PAIRS)
@pytest.mark.slow
def test_program(size, name):
    program = collective_programs.PROGRAMS[name]
    program.check(run_ranks(size, lambda comm: program.run(hvd), timeout=30))


@pytest.fixture
def alone():
    with use(SoloComm()):
        yield


def test_alone_values_come_back(alone):
    x = np.arange(6.0).reshape(3, 2)
    for function in (hvd.allreduce, hvd.allgather, hvd.reducescatter, hvd.alltoall):
        np.testing.assert_array_equal(function(x), x)
    for op in (hvd.Sum, hvd.Adasum, hvd.Min, hvd.Max, hvd.Product):
        np.testing.assert_array_equal(hvd.allreduce(x, op=op), x)
    for function in (hvd.grouped_allreduce, hvd.grouped_allgather, hvd.grouped_reducescatter):
        np.testing.assert_array_equal(function([x, 2 * x])[1], 2 * x)
    np.testing.assert_array_equal(hvd.allreduce(x, prescale_factor=3.0, postscale_factor=0.5), 1.5 * x)
    np.testing.assert_array_equal(hvd.allreduce([3, -3], postscale_factor=0.5), [1, -1])
    np.testing.assert_array_equal(hvd.broadcast(x, 0), x)
    received, splits = hvd.alltoall(x, [3])
    np.testing.assert_array_equal(received, x)
    assert splits.numpy().tolist() == [3]
    variable = tf.Variable(x)
    np.testing.assert_array_equal(hvd.broadcast_([variable], 0)[0], x)


def test_the_old_argument_average(alone):
    with pytest.warns(DeprecationWarning, match="pass op=hvd.Average or op=hvd.Sum") as caught:
        hvd.allreduce(1.0, average=True)
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="`average` must be left out where `op` is given"):
        hvd.allreduce(1.0, average=True, op=hvd.Sum)

    def run(comm):
        return [float(hvd.allreduce(comm.rank + 1.0, average=average)) for average in (True, False)]

    with pytest.warns(DeprecationWarning, match="deprecated"):
        assert run_ranks(2, run) == [[1.5, 3.0]] * 2


@pytest.mark.parametrize("op", ["Adasum", "Min", "Max", "Product"])
def test_no_gradient_of(op):
    def run(comm):
        x = tf.constant([1.0])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = hvd.allreduce(x, op=getattr(hvd, op))
        tape.gradient(y, x)

    with pytest.raises(LookupError, match=f"Received: op={op}"):
        run_ranks(2, run)


SLICES = tf.IndexedSlices(np.ones([1, 2]), np.array([0]), np.array([3, 2]))
WHOLE_SLICES = tf.IndexedSlices(np.ones([1, 2], "int32"), np.array([0]), np.array([3, 2]))
WRONG = [
    (lambda: hvd.allreduce(1.0, op="sum"), ValueError, "`op` must be one of hvd.Average"),
    (lambda: hvd.reducescatter([1.0], op=hvd.Min), ValueError, "`op` must be one of hvd.Average, hvd.Sum"),
    (lambda: hvd.allreduce(1.0, compression="fp16"), ValueError, "`compression` must be"),
    (
        lambda: hvd.allreduce(1.0, op=hvd.Adasum, compression=hvd.Compression.fp16),
        ValueError,
        "`compression` must be hvd.Compression.none",
    ),
    (lambda: hvd.allreduce(1.0, prescale_factor="2"), ValueError, "`prescale_factor` must be a finite"),
    (lambda: hvd.allreduce(1.0, op=hvd.Max, postscale_factor=2), ValueError, "`postscale_factor` must be 1"),
    (lambda: hvd.allreduce(SLICES, op=hvd.Max), ValueError, "for tf.IndexedSlices"),
    (
        lambda: hvd.allreduce(WHOLE_SLICES, prescale_factor=0.5),
        TypeError,
        "must be floating in tf.IndexedSlices",
    ),
    (lambda: hvd.loss_weight([1.0]), ValueError, "`count` must be one number"),
    (lambda: hvd.allreduce(1j), TypeError, "`value` must hold real numbers"),
    (lambda: hvd.allreduce([True]), TypeError, "`value` must hold real numbers"),
    (lambda: hvd.allreduce([1], op=hvd.Adasum), TypeError, "must be floating for op=Adasum"),
    (lambda: hvd.allgather(["text"]), TypeError, "`value` must hold numbers"),
    (lambda: hvd.allgather(SLICES), TypeError, "`value` must hold dense tensors"),
    (lambda: hvd.allgather(1.0), ValueError, "at least one axis"),
    (lambda: hvd.reducescatter(1.0), ValueError, "at least one axis"),
    (lambda: hvd.reducescatter([True]), TypeError, "`value` must hold real numbers"),
    (lambda: hvd.alltoall(1.0), ValueError, "`tensor` must have at least one axis"),
    (lambda: hvd.alltoall([1.0], [1.0]), ValueError, "`splits` must be integers"),
    (lambda: hvd.alltoall([1.0], [2]), ValueError, "add up to the rows"),
    (lambda: hvd.broadcast(1.0, 1), ValueError, "`root_rank` must be one of the ranks"),
    (lambda: hvd.broadcast_([1.0], 0), TypeError, "`variables` must hold"),
    (lambda: hvd.grouped_allreduce(np.ones(2)), TypeError, "`tensors` must be a list or tuple"),
    (lambda: hvd.allreduce(1.0, name=""), ValueError, "`name` must be a string"),
    (lambda: hvd.allreduce(1.0, process_set=[0]), TypeError, "`process_set` must be a hvd.ProcessSet"),
    (lambda: hvd.allreduce(1.0, process_set=hvd.ProcessSet([1])), ValueError, "must contain the rank"),
    (lambda: hvd.allreduce(1.0, opp=hvd.Sum), TypeError, "Did you mean `op`"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_refusals(call, error, message, alone):
    with pytest.raises(error, match=message):
        call()


def test_a_static_shape_is_needed_for_fp16():
    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def step(x):
        return hvd.allreduce(x, compression=hvd.Compression.fp16)

    with pytest.raises(ValueError, match="must have a static shape"):
        run_ranks(2, lambda comm: step(tf.ones([2])))


def test_before_init(monkeypatch):
    monkeypatch.setattr("hvdext.comm.current._process_comm", None)
    with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
        hvd.allreduce(1.0)
