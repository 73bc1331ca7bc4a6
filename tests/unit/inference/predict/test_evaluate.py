"""`hvd.evaluate` gives on every rank what `model.evaluate` gives in one process."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.testing import run_ranks
from tests.unit.inference.predict.predict_kinds import (
    BATCH,
    ROWS,
    Indexed,
    dataset,
    npy_folder,
    numbers,
    of_unknown_length,
    seeded,
)

SIZES = (1, 2, 4)


def classifier(metrics=("accuracy",), **compiled):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(
        "sgd",
        "binary_crossentropy",
        metrics=list(metrics),
        weighted_metrics=["mae"],
        **compiled,
    )
    return seeded(model)


def with_many_metrics():
    metrics = keras.metrics
    return classifier(
        ["accuracy", metrics.AUC(num_thresholds=20, name="auc"), metrics.Precision(name="precision")]
    )


def two_outputs():
    inputs = keras.Input((6,))
    outputs = {"a": keras.layers.Dense(1, name="a")(inputs), "b": keras.layers.Dense(2, name="b")(inputs)}
    model = keras.Model(inputs, outputs)
    model.compile("sgd", {"a": "mse", "b": "mae"}, metrics={"b": ["mse"]})
    return seeded(model)


def targets():
    return (np.arange(ROWS) % 3 == 0).astype("float64")[:, np.newaxis]


def weights():
    return np.linspace(0, 2, ROWS)


def of_two():
    return {"a": targets(), "b": numbers(width=2)}


# Per kind: the model and its arguments.
KINDS = {
    "arrays": (classifier, lambda folder: {"x": numbers(), "y": targets(), "batch_size": BATCH}),
    "many metrics": (
        with_many_metrics,
        lambda folder: {"x": numbers(), "y": targets(), "batch_size": BATCH},
    ),
    "eager": (
        lambda: classifier(run_eagerly=True),
        lambda folder: {"x": numbers(), "y": targets(), "batch_size": BATCH},
    ),
    "weighted": (
        classifier,
        lambda folder: {"x": numbers(), "y": targets(), "sample_weight": weights(), "batch_size": BATCH},
    ),
    "several steps per execution": (
        lambda: classifier(steps_per_execution=3),
        lambda folder: {"x": numbers(), "y": targets(), "batch_size": BATCH},
    ),
    "two outputs": (two_outputs, lambda folder: {"x": numbers(), "y": of_two(), "batch_size": BATCH}),
    "two outputs, weighted": (
        two_outputs,
        lambda folder: {"x": numbers(), "y": of_two(), "sample_weight": weights(), "batch_size": BATCH},
    ),
    "data set": (classifier, lambda folder: {"x": dataset(numbers(dtype="float32"), targets())}),
    "data set of unknown length": (
        classifier,
        lambda folder: {"x": of_unknown_length(numbers(dtype="float32"), targets(), weights())},
    ),
    "PyDataset": (classifier, lambda folder: {"x": Indexed(numbers(dtype="float32"), targets())}),
    "fewer batches than ranks": (
        classifier,
        lambda folder: {"x": numbers(), "y": targets(), "batch_size": 40},
    ),
    "a data set of one batch": (
        classifier,
        lambda folder: {"x": dataset(numbers(dtype="float32"), targets()).take(1)},
    ),
    "one batch": (classifier, lambda folder: {"x": numbers(), "y": targets(), "batch_size": 100}),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_equal_to_plain_keras(name, tmp_path):
    make, arguments = KINDS[name]
    plain = make()
    expected = plain.evaluate(**arguments(tmp_path), verbose=0, return_dict=True)
    in_order = plain.evaluate(**arguments(tmp_path), verbose=0)

    def program(comm):
        model = make()
        by_name = hvd.evaluate(model, **arguments(tmp_path), verbose=0, return_dict=True)
        return by_name, hvd.evaluate(model, **arguments(tmp_path), verbose=0)

    for ranks in {"arrays": (1, 2), "one batch": (3,)}.get(name, (2,)):
        for by_name, listed in run_ranks(ranks, program):
            assert by_name == pytest.approx(expected, rel=1e-5)
            assert list(by_name) == list(expected)
            assert listed == pytest.approx(in_order, rel=1e-5)


@pytest.mark.slow
def test_folders(tmp_path):
    npy_folder(tmp_path / "x", numbers())
    npy_folder(tmp_path / "y", targets(), sizes=(3, 50))
    expected = classifier().evaluate(numbers(), targets(), BATCH, verbose=0)

    def program(comm):
        return hvd.evaluate(classifier(), tmp_path / "x", tmp_path / "y", BATCH, verbose=0)

    for found in run_ranks(2, program):
        assert found == pytest.approx(expected, rel=1e-5)


def test_loss_alone():
    def program(comm):
        model = seeded(keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]))
        model.compile("sgd", "mse")
        return model, hvd.evaluate(model, numbers(), targets(), verbose=0)

    (model, first), (_, second) = run_ranks(2, program)
    assert isinstance(first, float)
    assert first == second
    assert first == pytest.approx(model.evaluate(numbers(), targets(), verbose=0), rel=1e-6)


def test_each_rank_runs_its_own_batches():
    """A data set is not simply evaluated by everybody."""

    def program(comm):
        data = Indexed(numbers(40 * BATCH, dtype="float32"), np.zeros((40 * BATCH, 1)))
        hvd.evaluate(classifier(), data, verbose=0)
        return sorted(data.asked[1:])  # the first of all is compared between the ranks before

    first, second = run_ranks(2, program)
    assert first == list(range(20))
    assert second == list(range(20, 40))


class ArgIoU(keras.metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, keras.ops.cast(y_pred > 0.3, "int32"), sample_weight)


class Largest(keras.metrics.Metric):
    def __init__(self):
        super().__init__(name="largest")
        self.found = self.add_variable((), "zeros", name="found")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.found.assign(keras.ops.maximum(self.found, keras.ops.max(y_pred)))

    def result(self):
        return self.found + 0.0


class OwnStep(keras.Sequential):
    """Logs of each batch alone, as of a step that knows no metrics."""

    def test_step(self, data):
        x, y = data
        return {"error": keras.ops.mean(keras.ops.abs(self(x) - y)), "rows": keras.ops.shape(x)[0]}


def test_metrics_of_the_users_own():
    arguments = {"x": numbers(), "y": targets(), "batch_size": BATCH, "verbose": 0, "return_dict": True}

    def make():
        return classifier([ArgIoU(2, name="iou"), Largest()], run_eagerly=True)

    expected = make().evaluate(**arguments)
    for found in run_ranks(2, lambda comm: hvd.evaluate(make(), **arguments, reductions={"largest": "max"})):
        assert found == pytest.approx(expected, rel=1e-5)
    assert "`reductions` must map names" in refused(
        lambda comm: hvd.evaluate(make(), **arguments, reductions={"largest": "median"})
    )


@pytest.mark.parametrize("data", ["arrays", "data set"])
def test_a_step_of_the_users_own_gives_what_its_last_batch_gave(data):
    arguments = {"batch_size": BATCH} if data == "arrays" else {}
    x, y = numbers(dtype="float32"), targets().astype("float32")
    arguments |= {"x": x, "y": y} if data == "arrays" else {"x": of_unknown_length(x, y)}

    def program(comm):
        model = OwnStep([keras.Input((6,)), keras.layers.Dense(1)])
        model.compile(loss="mse", run_eagerly=True)
        arguments_here = arguments if data == "arrays" else {"x": of_unknown_length(x, y)}
        return hvd.evaluate(seeded(model), **arguments_here, verbose=0, return_dict=True)

    model = OwnStep([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(loss="mse", run_eagerly=True)
    expected = seeded(model).evaluate(**arguments, verbose=0, return_dict=True)
    assert expected["rows"] == ROWS % BATCH
    with pytest.warns(UserWarning, match="'error' in the logs belongs to no metric"):
        results = run_ranks(2, program)
    for found in results:
        assert found == pytest.approx(expected, rel=1e-5)


def refused(call):
    def program(comm):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call(comm)
        return str(caught.value)

    messages = set(run_ranks(2, program))
    assert len(messages) == 1, messages
    return messages.pop()


@pytest.mark.slow
def test_refused_on_every_rank_alike():
    def uncompiled(comm):
        hvd.evaluate(keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)]), numbers(), targets())

    assert "`model` must be compiled" in refused(uncompiled)
    assert "`x` must have at least one row" in refused(
        lambda c: hvd.evaluate(classifier(), numbers(0), targets()[:0])
    )
    assert "`x`, `y` must have equally many rows" in refused(
        lambda c: hvd.evaluate(classifier(), numbers(), targets()[:5])
    )
    assert "`sample_weight` must come with `y`" in refused(
        lambda c: hvd.evaluate(classifier(), numbers(), sample_weight=weights())
    )
    assert "`y` must be None where `x` is a tf.data.Dataset" in refused(
        lambda c: hvd.evaluate(classifier(), dataset(numbers()), targets())
    )

    def longer(comm):
        rows = 37 + 12 * comm.rank
        x, y = numbers(rows, dtype="float32"), np.zeros((rows, 1))
        hvd.evaluate(classifier(), of_unknown_length(x, y), verbose=0)

    assert "Received, by rank: [10, 13] batches" in refused(longer)


def test_a_batch_that_fails_on_one_rank():
    class Failing(Indexed):
        def __getitem__(self, index):
            if index == 9:
                raise ZeroDivisionError("bad rows")
            return super().__getitem__(index)

    data = Failing(numbers(dtype="float32"), targets())
    message = refused(lambda c: hvd.evaluate(classifier(), data, verbose=0))
    assert message == "hvd.evaluate has failed:\n  rank 1: ZeroDivisionError: bad rows"
