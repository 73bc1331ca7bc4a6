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
    "a batch that fails": Program(_failed, _check_failed, sizes=(2,)),
}
