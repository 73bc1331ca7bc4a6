"""States, their callbacks within `fit`, and which errors mean that a rank was lost."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.elastic.failure import is_lost_rank
from hvdext.testing import run_ranks
from tests.multiprocess.programs import elastic_programs
from tests.multiprocess.programs.elastic_programs import ROWS, data, make_model, numbers


@pytest.fixture
def alone():
    """One process that no launcher started, and in which Horovod cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "horovod"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "horovod", None)
        with use(SoloComm()):
            yield


# -- states among ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", elastic_programs.PROGRAMS)
@pytest.mark.slow
def test_program_with_threads(name):
    program = elastic_programs.PROGRAMS[name]
    program.check(run_ranks(2, lambda comm: program.run(hvd)))


def test_what_counts_is_the_current_value_of_rank_0():
    def run(comm):
        state = hvd.elastic.State(epoch=comm.rank)
        state.epoch += 10  # as read from a checkpoint, and never saved
        state.sync()
        return state.epoch

    assert run_ranks(3, run) == [10, 10, 10]


def test_random_generators_are_restored_but_differ_between_ranks():
    def run(comm):
        dropout = keras.layers.Dropout(0.5, seed=comm.rank)
        model = keras.Sequential([keras.Input((2,)), dropout, keras.layers.Dense(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        state = hvd.elastic.KerasState(model)
        state.sync()
        x = np.ones((3, 2), "float32")
        begin = dropout.seed_generator.state.numpy().tolist()
        masks = []
        for _ in range(2):
            masks.append(dropout(x, training=True).numpy().tolist())
            moved = dropout.seed_generator.state.numpy().tolist()
            state.restore()
        return begin, moved, masks

    (begin, moved, (mask, again)), (other_begin, _, _) = run_ranks(2, run)
    assert begin != other_begin
    assert begin != moved
    assert mask == again


def test_ranks_with_other_models_all_hear_of_it():
    def run(comm):
        units = 1 + comm.rank
        state = hvd.elastic.TensorFlowState([tf.Variable(tf.zeros([units]))])
        with pytest.raises(ValueError, match="The ranks disagree") as caught:
            state.sync()
        return str(caught.value)

    first, second = run_ranks(2, run)
    assert first == second


def test_micro_batches_that_were_not_committed_are_dropped():
    """SGD with learning rate 1 subtracts the sum over two micro-batches of the mean over two ranks."""

    def run(comm):
        model = make_model(hvd, keras.optimizers.SGD(1.0), backward_passes_per_step=2)
        state = hvd.elastic.KerasState(model)
        state.sync()
        weights = model.trainable_variables
        start = numbers(weights)
        for value in (100.0, 1.0, 2.0):  # the first one is taken back
            model.optimizer.apply([tf.fill(w.shape, value * (1 + comm.rank)) for w in weights], weights)
            if value == 100.0:
                state.restore()
        return [float(np.ptp(s - e) + (s - e).flat[0]) for s, e in zip(start, numbers(weights), strict=True)]

    for rank in run_ranks(2, run):
        assert rank == pytest.approx([1.5 * (1 + 2)] * 4, abs=1e-5)


@pytest.mark.slow
def test_a_reset_compares_the_ranks_anew_and_drops_compiled_steps():
    def run(comm):
        model = make_model(hvd, keras.optimizers.SGD(0.1))
        state = hvd.elastic.KerasState(model)
        state.sync()
        called = []
        state.register_reset_callbacks([lambda: called.append(comm.rank)])
        model.fit(*data(comm.rank, 1), ROWS, verbose=0)
        traced, calls = model.train_function, comm.traffic()["agreement"].calls
        state.on_reset()
        model.fit(*data(comm.rank, 1), ROWS, verbose=0)
        return model.train_function is traced, comm.traffic()["agreement"].calls > calls, called

    assert run_ranks(2, run) == [(False, True, [0]), (False, True, [1])]


def test_the_loss_scale_is_part_of_the_state(alone):
    inner = keras.optimizers.SGD(0.1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(inner))
    state = hvd.elastic.KerasState(model, optimizer)
    optimizer.dynamic_scale.assign(8.0)
    state.commit()
    optimizer.dynamic_scale.assign(2.0)
    inner.iterations.assign(5)
    state.restore()
    assert float(optimizer.dynamic_scale) == 8.0
    assert int(inner.iterations) == 0


@pytest.mark.parametrize(("announced", "skips"), [([1], True), ([2], False), ([1, 2], False)])
def test_all_ranks_stop_when_rank_0_hears_of_other_hosts(announced, skips):
    exceptions = pytest.importorskip("horovod.common.exceptions", exc_type=ImportError)

    def run(comm):
        state = hvd.elastic.State(batch=0)
        state.commit()  # nothing has happened yet
        for update in announced if comm.rank == 0 else []:
            state.on_hosts_updated(123, update)
        state.batch = 4
        with pytest.raises(exceptions.HostsUpdatedInterrupt) as caught:
            state.commit()
        state.batch = 5
        state.restore()
        state.commit()  # it is told once
        return state.batch, caught.value.skip_sync

    assert run_ranks(2, run) == [(4, skips)] * 2


# -- callbacks in a real fit -----------------------------------------------------------------------------


class _Recorder(hvd.elastic.KerasState):
    """Writes down what every commit has kept."""

    def commit(self):
        super().commit()
        iterations = int(self.optimizer.iterations)
        vars(self).setdefault("commits", []).append((self.epoch, self.batch, iterations))


def _fit(epoch=0, batch=0, every=1, reverse=False, steps_per_execution=1, more=(), **options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False, steps_per_execution=steps_per_execution)
    state = _Recorder(model, epoch=epoch, batch=batch)
    callbacks = [
        hvd.elastic.CommitStateCallback(state, every),
        hvd.elastic.UpdateBatchStateCallback(state),
        hvd.elastic.UpdateEpochStateCallback(state),
        *more,
    ]
    x, y = data(0, 4)
    history = model.fit(x, y, ROWS, verbose=0, callbacks=callbacks[::-1] if reverse else callbacks, **options)
    return state, history


@pytest.mark.parametrize("reverse", [False, True])
def test_commits_hold_the_batch_that_has_ended(alone, reverse):
    state, _ = _fit(reverse=reverse, epochs=2)
    first = [(0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (1, 0, 4)]
    assert state.commits == [*first, (1, 1, 5), (1, 2, 6), (1, 3, 7), (1, 4, 8), (2, 0, 8)]
    assert (state.epoch, state.batch) == (2, 0)


@pytest.mark.parametrize("reverse", [False, True])
def test_commits_every_third_batch(alone, reverse):
    state, _ = _fit(reverse=reverse, epochs=2, every=3)
    assert state.commits == [(0, 3, 3), (1, 0, 4), (1, 2, 6), (2, 0, 8)]


def test_commits_with_several_steps_per_execution(alone):
    state, _ = _fit(every=2, steps_per_execution=2)
    assert state.commits == [(0, 2, 2), (0, 4, 4), (1, 0, 4)]


@pytest.mark.parametrize("reverse", [False, True])
def test_an_interrupted_epoch_is_finished(alone, reverse):
    state, history = _fit(epoch=5, batch=3, every=100, reverse=reverse, epochs=2)
    assert state.commits == [(6, 0, 1), (7, 0, 5)]  # one batch of four, then a whole epoch
    assert len(history.history["loss"]) == 2


def test_epochs_are_numbered_alike_with_initial_epoch(alone):
    state, history = _fit(epoch=5, every=100, epochs=7, initial_epoch=5)
    assert state.commits == [(6, 0, 4), (7, 0, 8)]
    assert history.epoch == [5, 6]


def test_an_iterator_goes_on_after_a_shortened_epoch(alone):
    """As in a training that is resumed with the batches that are left."""
    x, y = data(0, 5)
    batches = [(x[i : i + ROWS], y[i : i + ROWS]) for i in range(0, len(x), ROWS)]
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model = keras.models.clone_model(plain)
    for each in (plain, model):
        each.compile("sgd", "mse", jit_compile=False)
    for batch in batches:
        plain.train_on_batch(*batch)

    state = hvd.elastic.KerasState(model, batch=1)
    update = hvd.elastic.UpdateBatchStateCallback(state)
    rest = tf.data.Dataset.from_tensor_slices((x, y)).batch(ROWS)
    model.fit(rest, epochs=2, steps_per_epoch=3, verbose=0, callbacks=[update])
    assert int(model.optimizer.iterations) == 2 + 3
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_others_may_stop_the_training_in_a_shortened_epoch(alone):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    state, history = _fit(batch=3, every=100, epochs=3, more=[Stop()])
    assert len(history.history["loss"]) == 1
    assert state.epoch == 1


# -- alone, without Horovod ------------------------------------------------------------------------------


def test_alone_it_is_a_plain_function(alone):
    model = make_model(hvd, keras.optimizers.SGD(0.1))
    state = hvd.elastic.KerasState(model, epoch=2)

    @hvd.elastic.run
    def train(state, factor, *, offset):
        """Says what."""
        state.commit()
        return factor * state.epoch + offset

    assert train(state, 3, offset=1) == 7
    assert train.__doc__ == "Says what."


def test_errors_of_the_function_itself_come_out(alone):
    @hvd.elastic.run
    def train(state):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        train(hvd.elastic.State())


def test_before_init():
    with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
        hvd.elastic.run(lambda state: None)(hvd.elastic.State())


# -- which errors ----------------------------------------------------------------------------------------

_SHUT_DOWN = "Horovod has been shut down. This was caused by an exception on one of the ranks"


def _raised_from(outer, inner):
    try:
        try:
            raise inner
        except Exception:
            raise outer  # noqa: B904  Keras does so too
    except Exception as error:
        return error


LOST = {
    "shut down": tf.errors.UnknownError(None, None, _SHUT_DOWN),
    "connection": tf.errors.UnknownError(None, None, "Read error [127.0.0.1] [[{{node hvdext.grad.sgd.0}}]]"),
    "wrapped": _raised_from(RuntimeError("in a layer"), tf.errors.InternalError(None, None, _SHUT_DOWN)),
}
OTHERS = {
    "data": tf.errors.UnknownError(None, None, "a file is missing"),
    "end of data": tf.errors.OutOfRangeError(None, None, "End of sequence"),
    "not TensorFlow's": RuntimeError("Horovod"),
    "mistake": tf.errors.FailedPreconditionError(None, None, "Horovod: Mismatched allreduce tensor shapes"),
    "numbers": tf.errors.InvalidArgumentError(None, None, "Incompatible shapes after HorovodAllreduce"),
}


@pytest.mark.parametrize("name", [*LOST, *OTHERS])
def test_lost_ranks_are_told_from_other_errors(name):
    assert is_lost_rank((LOST | OTHERS)[name]) == (name in LOST)


# -- arguments -------------------------------------------------------------------------------------------


def _unbuilt():
    return keras.Sequential([keras.layers.Dense(1)])


def _uncompiled():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


REFUSED = {
    "`model` must be built": lambda: hvd.elastic.KerasState(_unbuilt(), keras.optimizers.SGD()),
    "`optimizer` must be given": lambda: hvd.elastic.KerasState(_uncompiled()),
    r"Received: \['commit'\]": lambda: hvd.elastic.TensorFlowKerasState(
        _uncompiled(), keras.optimizers.SGD(), None, commit=1
    ),
    "`session` must be None": lambda: hvd.elastic.TensorFlowState([tf.Variable(1)], session=1),
    "`variables` must be a list of variables": hvd.elastic.TensorFlowState,
    "`batches_per_commit` must be": lambda: hvd.elastic.CommitStateCallback(hvd.elastic.State(), 0),
    "must have an attribute `batch`": lambda: hvd.elastic.UpdateBatchStateCallback(hvd.elastic.State()),
    "must have an attribute `epoch`": lambda: hvd.elastic.UpdateEpochStateCallback(hvd.elastic.State()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_run_wants_a_function():
    with pytest.raises(TypeError, match="`func` must be a function"):
        hvd.elastic.run(3)
