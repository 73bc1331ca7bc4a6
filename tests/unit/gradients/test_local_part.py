"""Variables that a rank keeps for itself may have other shapes on other ranks, or be missing there."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks


def _variables(rank):
    """Rank 0 has one table of its own, rank 1 two others; the last two variables are shared."""
    own = [tf.Variable(tf.zeros([7 + 2 * i + rank, 2]), name=f"own_{rank}_{i}") for i in range(1 + rank)]
    return own, [tf.Variable(tf.zeros([3, 2]), name="rows"), tf.Variable([0.0], name="head")]


def _gradients(rank, own):
    rows = tf.IndexedSlices(tf.fill([1, 2], rank + 1.0), tf.constant([rank]), tf.constant([3, 2]))
    return [*(tf.fill(v.shape, 4.0) for v in own), rows, tf.constant([rank + 2.0])]


def _check(found):
    """By hand: a step of 1 over means; of what is local, over this rank's own divided by 2."""
    for own, (rows, head) in found:
        assert all(np.all(table == -2.0) for table in own)
        np.testing.assert_allclose(rows, [[-0.5, -0.5], [-1, -1], [0, 0]])
        np.testing.assert_allclose(head, [-2.5])
    assert [len(own) for own, _ in found] == [1, 2]


def test_optimizer():
    def program(comm):
        own, shared = _variables(comm.rank)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        for variable in own:
            optimizer.register_local_var(variable)
        optimizer.apply(_gradients(comm.rank, own), [*own, *shared])
        return [v.numpy() for v in own], [v.numpy() for v in shared]

    _check(run_ranks(2, program))


def test_tape():
    def program(comm):
        own, shared = _variables(comm.rank)
        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            loss = tf.add_n([4 * tf.reduce_sum(table) for table in own])
            loss += (comm.rank + 1) * tf.reduce_sum(tf.gather(shared[0], [comm.rank]))
            loss += (comm.rank + 2) * tf.reduce_sum(shared[1])
        for variable in own:
            tape.register_local_source(variable)
        local, combined = tape.get_local_and_global_gradients(loss, [*own, *shared])
        for variable, gradient in [*local, *combined]:
            variable.assign_sub(tf.convert_to_tensor(gradient))
        assert [v.name for v, _ in local] == [v.name for v in own]
        return [v.numpy() for v in own], [v.numpy() for v in shared]

    _check(run_ranks(2, program))


def test_a_rank_that_joins_keeps_what_is_its_own():
    def program(comm):
        own, shared = _variables(comm.rank)
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), uneven_batches=True)
        optimizer.build([*own, *shared])
        for variable in own:
            optimizer.register_local_var(variable)
        for _ in range(1 + comm.rank):  # rank 1 has a second batch
            optimizer.apply(_gradients(comm.rank, own), [*own, *shared])
        hvd.join(optimizer)
        return [v.numpy()[0, 0] for v in own], [v.numpy().tolist() for v in shared]

    first, second = run_ranks(2, program)
    # By hand: the mean of both ranks, then that of rank 1 alone, whose local gradients are then its own.
    assert first[0] == [-2.0]
    assert second[0] == [-6.0, -6.0]
    for _, (rows, head) in (first, second):
        np.testing.assert_allclose(rows, [[-0.5, -0.5], [-3, -3], [0, 0]])
        np.testing.assert_allclose(head, [-5.5])


def test_all_skip_a_step_that_overflows_in_what_one_rank_keeps():
    def program(comm):
        own = [tf.Variable([0.0], name="own")] if comm.rank == 0 else []
        head = tf.Variable([0.0], name="head")
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1.0), initial_scale=4.0)
        optimizer = hvd.DistributedOptimizer(optimizer)
        optimizer.build([*own, head])
        for variable in own:
            optimizer.register_local_var(variable)
        seen = []
        for value in (float("inf"), 8.0):
            optimizer.apply([*([tf.constant([value])] * len(own)), tf.constant([4.0])], [*own, head])
            seen.append(head.numpy().tolist())
        return seen

    # The second step is scaled by half of 4, since all ranks have seen the overflow.
    assert run_ranks(2, program) == [[[0.0], [-2.0]]] * 2


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_fit_after_the_broadcast(kind):
    """Embedding tables of 7 and 9 rows in front of one head, as in models with an embedding per rank."""
    x, y = np.array([[1, 0]] * 4), np.ones((4, 1), "float32")

    def program(comm):
        inputs = keras.Input((2,), dtype="int32")
        table = keras.layers.Embedding(7 + 2 * comm.rank, 3, embeddings_initializer="ones")
        head = keras.layers.Dense(1, kernel_initializer="zeros")
        model = keras.Model(inputs, head(keras.layers.Flatten()(table(inputs))))
        head.bias.assign([comm.rank + 3.0])
        optimizer = keras.optimizers.get({"class_name": kind, "config": {"learning_rate": 0.5}})
        model.compile(hvd.PartialDistributedOptimizer(optimizer, local_layers=table), "mse", run_eagerly=True)
        callback = hvd.callbacks.BroadcastGlobalVariablesCallback(1, local_variables=table.variables)
        model.fit(x, y, verbose=0, callbacks=[callback])
        return table.embeddings.shape[0], head.bias.numpy()[0]

    # By hand, from rank 1's bias 4: the gradient is 2 * (4 - 1); Adam's first step is the learning rate.
    expected = 4 - 0.5 * 6 if kind == "sgd" else 3.5
    for rank, (rows, bias) in enumerate(run_ranks(2, program)):
        assert rows == 7 + 2 * rank
        np.testing.assert_allclose(bias, expected, rtol=1e-5)


def test_a_variable_that_is_local_on_one_rank_by_mistake():
    def program(comm):
        shared = _variables(comm.rank)[1]
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
        if comm.rank:
            optimizer.register_local_var(shared[0])
        with pytest.raises(ValueError, match=r"exchanged \(the others are local\): rank 0: 2; rank 1: 1"):
            optimizer.apply(_gradients(comm.rank, []), shared)

    run_ranks(2, program)
