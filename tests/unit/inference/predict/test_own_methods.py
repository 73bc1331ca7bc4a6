"""A model's own `predict` and `evaluate` are called, or refused by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

ROWS, BATCH = 10, 4
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
Y = np.linspace(0, 1, ROWS, dtype="float32")[:, np.newaxis]
TEXTS = [str(i % 7) for i in range(ROWS)]


class Scaled(keras.Sequential):
    width = 3

    def predict(self, x, **options):
        return super().predict(np.asarray(x) * 2, **options)

    def evaluate(self, x, y, **options):
        return super().evaluate(np.asarray(x) * 2, y, **options)


class Task(keras.Sequential):
    """Brings its preprocessing along, as the tasks of a hub do."""

    width = 1

    def _batches(self, x, y=None, sample_weight=None, batch_size=None):
        if not isinstance(x, tf.data.Dataset):
            packed = keras.utils.pack_x_y_sample_weight(tf.convert_to_tensor(x), y, sample_weight)
            x = tf.data.Dataset.from_tensor_slices(packed).batch(batch_size or 32)
        return x.map(self._preprocessed)

    def _preprocessed(self, x, y=None, sample_weight=None):
        return keras.utils.pack_x_y_sample_weight(tf.strings.to_number(x)[:, tf.newaxis], y, sample_weight)

    def predict(self, x=None, batch_size=None, **options):
        return super().predict(self._batches(x, batch_size=batch_size), **options)

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **options):
        return super().evaluate(self._batches(x, y, sample_weight, batch_size), **options)


class Centred(Scaled):
    def predict(self, x, **options):
        return super().predict(x - np.mean(x, axis=0), **options)

    def evaluate(self, x, y, **options):
        return super().evaluate(x - np.mean(x, axis=0), y, **options)


class Best(Scaled):
    def predict(self, x, **options):
        return [{"row": "a dict"}]

    def evaluate(self, x, y, **options):
        return [0.5]


class Needs(Scaled):
    def predict(self, x, threshold):
        return x > threshold

    def evaluate(self, x, y):
        return 0.0


class Circular(Scaled):
    def predict(self, x, **options):
        return hvd.predict(self, x)

    def evaluate(self, x, y, **options):
        return hvd.evaluate(self, x, y)


def make(cls):
    model = cls([keras.Input((cls.width,)), keras.layers.Dense(1)])
    model.compile(loss="mse", metrics=["mae"], run_eagerly=True)
    model.set_weights([np.linspace(0.5, 1, w.size).reshape(w.shape) for w in model.get_weights()])
    return model


def data_set():
    return {"x": tf.data.Dataset.from_tensor_slices((TEXTS, Y)).batch(BATCH).filter(lambda x, y: True)}


KINDS = {
    "arrays": (Scaled, lambda: {"x": X, "batch_size": BATCH}, {"y": Y}),
    "a task of texts": (Task, lambda: {"x": TEXTS, "batch_size": BATCH}, {"y": Y}),
    "a task of a data set": (Task, data_set, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_method_is_called_with_each_ranks_rows(name):
    cls, data, targets = KINDS[name]
    plain = make(cls)
    predicted = plain.predict(**data(), verbose=0)
    tested = plain.evaluate(**data(), **targets, verbose=0, return_dict=True)

    def run(comm):
        model = make(cls)
        options = {"verbose": 0} | data()
        return hvd.predict(model, **options, gather="all"), hvd.evaluate(
            model, **options, **targets, return_dict=True
        )

    for found, logs in run_ranks(2, run):
        np.testing.assert_array_equal(found, predicted)
        assert logs == pytest.approx(tested, rel=1e-5)


def test_rows_in_folders(tmp_path):
    for name, array in (("x", X), ("y", Y)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", array)

    def run(comm):
        model = make(Scaled)
        found = hvd.predict(model, tmp_path / "x", BATCH, verbose=0)
        return found, hvd.evaluate(model, tmp_path / "x", tmp_path / "y", BATCH, verbose=0)

    plain = make(Scaled)
    ((found, logs),) = run_ranks(1, run)
    np.testing.assert_array_equal(found, plain.predict(X, batch_size=BATCH, verbose=0))
    assert logs == pytest.approx(plain.evaluate(X, Y, batch_size=BATCH, verbose=0), rel=1e-5)


REFUSED = {
    Centred: "Centred.{} answers two batches together otherwise than each alone",
    Best: "from Best.{}",
    Needs: "in Needs.{}, which each rank calls",
    Circular: "must not be called by Circular.{}",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda cls: cls.__name__)
def test_what_cannot_be_shared_is_refused_by_name(cls):
    def run(comm):
        model, messages = make(cls), []
        for method, targets in (("predict", {}), ("evaluate", {"y": Y})):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                getattr(hvd, method)(model, X, batch_size=BATCH, verbose=0, **targets)
            messages.append(str(caught.value))
        return messages

    first, second = run_ranks(2, run)
    assert first == second
    for message, method in zip(first, ("predict", "evaluate"), strict=True):
        assert REFUSED[cls].format(method) in message


def test_a_data_set_of_python_is_refused():
    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return X[index : index + 1], Y[index : index + 1]

    with pytest.raises(ValueError, match=r"Scaled.predict, of which each rank is given a part.*Rows"):
        run_ranks(1, lambda comm: hvd.predict(make(Scaled), Rows(), verbose=0))


def test_every_rank_must_call():
    """Who calls alone is told so, when the others have gone."""
    told = []

    def run(comm):
        if comm.rank == 1:
            raise ZeroDivisionError("gone")
        with pytest.raises(RuntimeError) as caught:
            hvd.evaluate(make(Scaled), X, Y, verbose=0)
        told.append(str(caught.value))

    with pytest.raises(ZeroDivisionError):
        run_ranks(2, run)
    assert "hvd.evaluate must be called by every rank" in told[0]
