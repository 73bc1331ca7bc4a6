"""States of elastic training among ranks that hold different values, as threads and under horovodrun."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program

ROWS = 4


def make_model(hvd, optimizer, **options) -> keras.Model:
    """A compiled model whose weights are 0.1, 0.2, ... plus the rank."""
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="hidden"), keras.layers.Dense(1, name="out")]
    )
    weights = enumerate(model.get_weights(), start=1)
    model.set_weights([np.full(weight.shape, 0.1 * i + hvd.rank()) for i, weight in weights])
    model.compile(hvd.DistributedOptimizer(optimizer, **options), "mse", jit_compile=False)
    return model


def data(rank: int, batches: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([5, rank])
    x = generator.normal(size=(ROWS * batches, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def numbers(variables) -> list[np.ndarray]:
    return [tf.convert_to_tensor(v).numpy().copy() for v in variables]


def _run_keras_state(hvd):
    """Trains, commits, trains on, restores; then the same steps once more."""
    model = make_model(hvd, keras.optimizers.Adam(0.05, name="adam"))
    state = hvd.elastic.KerasState(model, epoch=3 * hvd.rank(), seen=[hvd.rank()])
    found = {"before": model.get_weights()}

    @hvd.elastic.run
    def train(state, batches):
        found["synchronised"] = [*model.get_weights(), state.epoch, state.seen]
        x, y = data(hvd.rank(), batches)
        model.fit(x[: 2 * ROWS], y[: 2 * ROWS], ROWS, verbose=0, shuffle=False)
        state.epoch += 1
        state.seen.append("committed")
        state.commit()
        everything = [*model.variables, *model.optimizer.variables]
        found["committed"] = numbers(model.optimizer.variables)
        ends = []
        for _ in range(2):
            state.seen.append("lost")
            state.epoch = 100
            model.fit(x[2 * ROWS :], y[2 * ROWS :], ROWS, verbose=0, shuffle=False)
            ends.append(numbers(everything[:4] + list(model.optimizer.variables)))
            state.restore()
            found["restored"] = numbers(model.optimizer.variables)
        found["ends"] = ends
        found["values"] = [state.epoch, state.seen]
        return "returned"

    found["outcome"] = train(state, batches=5)
    return found


def _check_keras_state(ranks):
    first = ranks[0]
    for number, found in enumerate(ranks):
        assert np.allclose(found["before"][0], 0.1 + number)
        *weights, epoch, seen = found["synchronised"]
        for mine, roots in zip(weights, first["before"], strict=True):
            np.testing.assert_array_equal(mine, roots)
        assert (epoch, seen[:1]) == (0, [0])
        assert found["values"] == [1, [0, "committed"]]
        for then, now, end in zip(found["committed"], found["restored"], found["ends"][0][4:], strict=True):
            np.testing.assert_array_equal(then, now)
            assert np.shape(then) == () or not np.array_equal(then, end)  # training went on in between
        assert found["committed"][0] == 2  # iterations
        for one, other in zip(*found["ends"], strict=True):
            np.testing.assert_array_equal(one, other)
        for mine, roots in zip(found["ends"][0], first["ends"][0], strict=True):
            np.testing.assert_array_equal(mine, roots)
        assert found["outcome"] == "returned"


def _run_variables(hvd):
    variables = [tf.Variable([1.0 + hvd.rank()]), keras.Variable(2 * hvd.rank(), dtype="int64")]
    state = hvd.elastic.TensorFlowState(variables, best={"loss": hvd.rank() + 0.5})
    state.sync()
    synchronised = [*numbers(variables), dict(state.best)]
    variables[0].assign([7.0 + hvd.rank()])
    state.best["loss"] = hvd.rank()
    state.commit()
    variables[0].assign([-1.0])
    state.best["loss"] = -1.0
    state.restore()
    return {"synchronised": synchronised, "restored": [*numbers(variables), state.best]}


def _check_variables(ranks):
    for number, found in enumerate(ranks):
        assert found["synchronised"] == [[1.0], 0, {"loss": 0.5}]
        assert found["restored"] == [[7.0 + number], 0, {"loss": number}]


PROGRAMS = {
    "elastic: model and optimizer": Program(_run_keras_state, _check_keras_state, sizes=(2,)),
    "elastic: variables": Program(_run_variables, _check_variables, sizes=(2,)),
}
