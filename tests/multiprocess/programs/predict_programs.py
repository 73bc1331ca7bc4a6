"""`hvd.predict` and `hvd.evaluate` under horovodrun; every rank works out by plain Keras what must come."""

from __future__ import annotations

import shutil
import tempfile

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program

BATCH = 16


def make_model(nested=True) -> keras.Model:
    """Two inputs, nested outputs; the same weights in every process."""
    one, two = keras.Input((6,), name="one"), keras.Input((2,), name="two")
    hidden = keras.layers.Dense(5, activation="tanh")(one)
    joined = keras.layers.Concatenate()([hidden, two])
    outputs = {"sum": keras.layers.Dense(2)(joined), "hidden": [hidden] if nested else hidden}
    model = keras.Model({"one": one, "two": two}, outputs)
    generator = np.random.default_rng(1)
    model.set_weights([generator.normal(size=w.shape) for w in model.get_weights()])
    return model


def data(rows) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(2)
    return {"one": generator.normal(size=(rows, 6)), "two": generator.normal(size=(rows, 2))}


def batches(rows) -> tf.data.Dataset:
    """A data set that does not know its length."""
    parts = {name: array.astype("float32") for name, array in data(rows).items()}
    return tf.data.Dataset.from_tensor_slices(parts).batch(BATCH).filter(lambda part: True)


class Failing(keras.utils.PyDataset):
    """Cannot give batch 5."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 5:
            raise ZeroDivisionError("bad rows")
        return ({name: array.astype("float32") for name, array in data(BATCH).items()},)


def _is_same(found, expected):
    keras.tree.assert_same_structure(found, expected)
    pairs = zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def _predictions(hvd):
    model = make_model()
    expected = {
        rows: model.predict(data(rows), max(BATCH, rows // 100), verbose=0) for rows in (1, 3, 1000, 60_000)
    }
    found = {}
    for rows, plain in expected.items():
        predicted = hvd.predict(model, data(rows), max(BATCH, rows // 100), verbose=0)
        found[f"{rows} rows"] = _is_same(predicted, plain) if hvd.rank() == 0 else predicted is None
    everyone = hvd.predict(model, data(1000), BATCH, gather="all", verbose=0)
    found["on all ranks"] = _is_same(everyone, model.predict(data(1000), BATCH, verbose=0))
    counted = hvd.predict(model, batches(333), gather="all", verbose=0)
    found["data set"] = _is_same(counted, model.predict(data(333), BATCH, verbose=0))
    nothing = hvd.predict(model, data(0), gather="all", verbose=0)
    found["no rows"] = keras.tree.map_structure(np.shape, nothing) == {"sum": (0, 2), "hidden": [(0, 5)]}
    return found


def _streamed(hvd):
    folder = tempfile.mkdtemp() if hvd.rank() == 0 else None
    folder = hvd.broadcast_object(folder)
    try:
        found = {}
        for name in ("written", "taken up"):
            predicted = hvd.predict(make_model(), data(1000), BATCH, output=folder, resume=True, verbose=0)
            plain = make_model().predict(data(1000), BATCH, verbose=0)
            found[name] = predicted is None if hvd.rank() else _is_same(predicted, plain)
        return found
    finally:
        hvd.barrier()
        shutil.rmtree(folder, ignore_errors=True)


def _evaluated(hvd):
    model = make_model(nested=False)
    model.compile("sgd", {"sum": "mse", "hidden": "mae"}, metrics={"sum": ["mae"]})
    y = {"sum": np.ones((333, 2)), "hidden": np.zeros((333, 5))}
    plain = model.evaluate(data(333), y, BATCH, verbose=0, return_dict=True)
    # 1000 rows per batch: all but one rank have nothing to do.
    few = hvd.evaluate(model, data(333), y, 1000, verbose=0, return_dict=True)
    return {
        "plain": plain,
        "shared": hvd.evaluate(model, data(333), y, BATCH, verbose=0, return_dict=True),
        "plain, one batch": model.evaluate(data(333), y, 1000, verbose=0, return_dict=True),
        "shared, one batch": few,
    }


class Noisy(keras.Sequential):
    """Doubles its input in `predict`, and adds noise at prediction."""

    def predict(self, x, **options):
        return super().predict(np.asarray(x) * 2, **options)


class Noise(keras.layers.Layer):
    def __init__(self, seed):
        super().__init__()
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.generator)


class Agreed(keras.metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, keras.ops.cast(y_pred > 0, "int32"), sample_weight)


def _of_users(hvd):
    """Random layers, methods and metrics of the user's own."""
    x = np.random.default_rng(4).normal(size=(5 * BATCH + 3, 3)).astype("float32")
    y = (np.arange(len(x)) % 3 == 0).astype("int32")[:, np.newaxis]
    found = {}
    random, plain = (
        keras.Sequential([keras.Input((3,)), Noise(seed)]) for seed in (7 + hvd.rank(), 7)
    )  # rank 0's state counts
    noise = hvd.predict(random, x, BATCH, gather="all", verbose=0)
    found["noise"] = _is_same(noise, plain.predict(x, BATCH, verbose=0))

    own = Noisy([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="ones")])
    own.compile(loss="mse", metrics=[Agreed(2, name="agreed")])
    doubled = hvd.predict(own, x, BATCH, gather="all", verbose=0)
    found["a method"] = _is_same(doubled, own.predict(x, batch_size=BATCH, verbose=0))
    logs = hvd.evaluate(own, x, y, BATCH, verbose=0, return_dict=True)
    expected = own.evaluate(x, y, BATCH, verbose=0, return_dict=True)
    found["a metric"] = bool(np.isclose(logs["agreed"], expected["agreed"], rtol=1e-5))

    inputs = keras.Input(batch_shape=(BATCH, 3, 1))
    stateful = keras.Model(
        inputs, keras.layers.SimpleRNN(2, stateful=True, kernel_initializer="ones")(inputs)
    )
    stateful.set_weights([np.full_like(w, 0.5) for w in stateful.get_weights()])
    try:
        hvd.predict(stateful, np.zeros((2 * BATCH, 3, 1)), BATCH, verbose=0)
    except ValueError as error:
        found["states"] = "are stateful" in str(error)
    return found


def _failed(hvd):
    try:
        hvd.predict(make_model(), Failing(), verbose=0)
    except RuntimeError as error:
        # The engine goes on working.
        return [str(error), sum(hvd.allgather_object(1))]
    return ["no error", 0]


def _check_all(ranks):
    for rank in ranks:
        assert rank
        assert all(rank.values()), rank


def _check_evaluated(ranks):
    for rank in ranks:
        for suffix in ("", ", one batch"):
            found, plain = rank["shared" + suffix], rank["plain" + suffix]
            assert list(found) == list(plain)
            np.testing.assert_allclose(list(found.values()), list(plain.values()), rtol=1e-5)


def _check_failed(ranks):
    assert len({message for message, _ in ranks}) == 1
    message, total = ranks[0]
    assert "batch 5: ZeroDivisionError: bad rows" in message
    assert total == len(ranks)


PROGRAMS = {
    "predictions": Program(_predictions, _check_all, sizes=(2, 4)),
    "predictions streamed": Program(_streamed, _check_all, sizes=(2,)),
    "evaluated": Program(_evaluated, _check_evaluated, sizes=(2, 4)),
    "of users": Program(_of_users, _check_all, sizes=(2,)),
    "a batch that fails": Program(_failed, _check_failed, sizes=(2,)),
}
