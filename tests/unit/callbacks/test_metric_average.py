"""The logs of ranks with different numbers of samples are those of one process over all samples."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.collectives.metric_sums import weighted_mean
from hvdext.testing import run_ranks

TRAINING = (6, 10, 4)  # samples of each rank
VALIDATION = (5, 3, 0)

metrics = keras.metrics


def _probabilities(generator, n):
    z = np.exp(2 * generator.normal(size=(n, 4)))
    return z / z.sum(axis=1, keepdims=True)


def _binary(generator, n):
    return generator.uniform(size=(n, 1)), generator.integers(0, 2, size=(n, 1))


def _one_hot(generator, n):
    return _probabilities(generator, n), np.eye(4)[generator.integers(0, 4, size=n)]


def _sparse(generator, n):
    return _probabilities(generator, n), generator.integers(0, 4, size=(n, 1))


def _regression(generator, n):
    x = generator.integers(0, 3, size=(n, 3)) + 1.0
    return x, np.where(generator.uniform(size=x.shape) < 0.3, x, x + generator.normal(size=x.shape))


# Per kind of data: the loss and every metric class of Keras that fits.
KINDS = {
    _binary: (
        "binary_crossentropy",
        lambda: [
            metrics.AUC(num_thresholds=50),
            metrics.BinaryAccuracy(),
            metrics.BinaryCrossentropy(),
            metrics.BinaryIoU(),
            metrics.FalseNegatives(),
            metrics.FalsePositives(),
            metrics.Hinge(),
            metrics.Precision(),
            metrics.PrecisionAtRecall(0.5, num_thresholds=50),
            metrics.Recall(),
            metrics.RecallAtPrecision(0.6, num_thresholds=50),
            metrics.SensitivityAtSpecificity(0.6, num_thresholds=50),
            metrics.SpecificityAtSensitivity(0.6, num_thresholds=50),
            metrics.SquaredHinge(),
            metrics.TrueNegatives(),
            metrics.TruePositives(),
        ],
    ),
    _one_hot: (
        "categorical_crossentropy",
        lambda: [
            metrics.CategoricalAccuracy(),
            metrics.CategoricalCrossentropy(),
            metrics.CategoricalHinge(),
            metrics.CosineSimilarity(),
            metrics.F1Score(),
            metrics.FBetaScore(average="macro", beta=2.0),
            metrics.KLDivergence(),
            metrics.OneHotIoU(4, [0, 2]),
            metrics.OneHotMeanIoU(4),
            metrics.Poisson(),
            metrics.TopKCategoricalAccuracy(2),
        ],
    ),
    _sparse: (
        "sparse_categorical_crossentropy",
        lambda: [
            metrics.IoU(4, [0, 1], sparse_y_pred=False),
            metrics.MeanIoU(4, sparse_y_pred=False),
            metrics.SparseCategoricalAccuracy(),
            metrics.SparseCategoricalCrossentropy(),
            metrics.SparseTopKCategoricalAccuracy(2),
        ],
    ),
    _regression: (
        "mse",
        lambda: [
            metrics.Accuracy(),
            metrics.ConcordanceCorrelation(),
            metrics.LogCoshError(),
            metrics.MeanAbsoluteError(),
            metrics.MeanAbsolutePercentageError(),
            metrics.MeanMetricWrapper(keras.losses.mean_squared_error, name="wrapped"),
            metrics.MeanSquaredError(),
            metrics.MeanSquaredLogarithmicError(),
            metrics.PearsonCorrelation(),
            metrics.R2Score(),
            metrics.RootMeanSquaredError(),
        ],
    ),
}


def _share(kind, rank, sizes):
    x, y = kind(np.random.default_rng([rank, *sizes]), sizes[rank])
    return x.astype("float32"), y.astype("float32")


def _whole(kind, sizes):
    shares = [_share(kind, rank, sizes) for rank in range(len(sizes))]
    return [np.concatenate(column) for column in zip(*shares, strict=True)]


def _model(outputs, loss, chosen, optimizer, **options):
    """Predicts its input; at learning rate 0 it stays so."""
    for metric in chosen:
        # Keras numbers them, and each thread counts for itself.
        metric.name = metric.name.rstrip("_0123456789")
    layer = keras.layers.Dense(outputs, use_bias=False, kernel_initializer="identity")
    model = keras.Sequential([keras.Input((outputs,)), layer])
    model.compile(optimizer, loss, metrics=chosen, jit_compile=False, **options)
    return model


def _distributed(rate=0.0):
    return hvd.DistributedOptimizer(keras.optimizers.SGD(rate))


def _assert_logs(logs, expected):
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def _plain_logs(kind, loss, make, sizes):
    x, y = _whole(kind, sizes)
    model = _model(x.shape[1], loss, make(), "sgd", run_eagerly=True)
    return model.evaluate(x, y, verbose=0, return_dict=True)


def test_every_metric_of_keras_is_listed():
    found = {m for m in vars(metrics).values() if isinstance(m, type) and issubclass(m, metrics.Metric)}
    listed = {type(metric) for _, make in KINDS.values() for metric in make()}
    assert listed | {metrics.Mean, metrics.Sum} == found - {metrics.Metric}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[1:])
@pytest.mark.slow
def test_every_metric_of_keras_is_exact(kind):
    loss, make = KINDS[kind]

    def run(comm):
        x, y = _share(kind, comm.rank, TRAINING)
        model = _model(x.shape[1], loss, make(), _distributed(), run_eagerly=True)
        history = model.fit(
            x,
            y,
            len(x),
            validation_data=_share(kind, comm.rank, VALIDATION),
            verbose=0,
            callbacks=[hvd.callbacks.MetricAverageCallback()],
        )
        return {name: values[0] for name, values in history.history.items()}

    expected = _plain_logs(kind, loss, make, TRAINING)
    validation = _plain_logs(kind, loss, make, VALIDATION)
    for logs in run_ranks(3, run):
        _assert_logs(logs, expected | {f"val_{name}": value for name, value in validation.items()})


class Watch(keras.layers.Layer):
    """Keeps what passes through it in the metrics that take one value."""

    def __init__(self):
        super().__init__()
        self.mean, self.sum = metrics.Mean("mean"), metrics.Sum("sum")

    def call(self, x):
        self.mean.update_state(x)
        self.sum.update_state(x)
        return x


def test_metrics_of_layers():
    def run(comm):
        x, y = _share(_binary, comm.rank, VALIDATION)
        model = keras.Sequential([keras.Input((1,)), Watch(), keras.layers.Dense(1)])
        model.compile(_distributed(), "mse", run_eagerly=True)
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        return model.evaluate(x, y, verbose=0, return_dict=True, callbacks=callbacks)

    x, _ = _whole(_binary, VALIDATION)
    for logs in run_ranks(3, run):
        assert logs["mean"] == pytest.approx(np.mean(x), rel=1e-5)
        assert logs["sum"] == pytest.approx(np.sum(x), rel=1e-5)


def test_a_mean_of_the_values_would_be_another():
    """What the sums are for: the AUC of all samples is no mean of the ranks' AUCs."""
    values = []
    for rank in range(2):
        x, y = _share(_binary, rank, VALIDATION)
        auc = metrics.AUC(num_thresholds=50)
        auc.update_state(y, x)
        values.append((float(auc.result()), len(x)))
    whole = metrics.AUC(num_thresholds=50)
    whole.update_state(*_whole(_binary, VALIDATION)[::-1])
    assert abs(weighted_mean(values) - float(whole.result())) > 0.02


# -- evaluate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_eagerly", [False, True], ids=["graph", "eager"])
@pytest.mark.slow
def test_evaluate_returns_the_logs_of_all_ranks(run_eagerly):
    """Also on a rank without a sample, whose metrics Keras cannot even build when it runs eagerly."""

    def make():
        return [metrics.AUC(num_thresholds=50), metrics.F1Score(threshold=0.5)]

    def run(comm):
        x, y = _share(_binary, comm.rank, VALIDATION)
        model = _model(1, "binary_crossentropy", make(), _distributed(), run_eagerly=run_eagerly)
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        logs = model.evaluate(x, y, 2, verbose=0, return_dict=True, callbacks=callbacks)
        values = model.evaluate(x, y, 2, verbose=0, callbacks=callbacks)
        own = model.evaluate(x, y, 2, verbose=0, return_dict=True) if len(x) else None
        return logs, values, own

    expected = _plain_logs(_binary, "binary_crossentropy", make, VALIDATION)
    results = run_ranks(3, run)
    for logs, values, _ in results:
        _assert_logs(logs, expected)
        assert values[0] == logs["loss"]
        np.testing.assert_array_equal(
            np.concatenate([np.ravel(v) for v in values[1:]]),
            np.concatenate([np.ravel(logs["auc"]), np.ravel(logs["f1_score"])]),
        )
    # Without the callback it is each rank's own again.
    own = [own["loss"] for _, _, own in results[:2]]
    assert abs(own[0] - own[1]) > 1e-3
    assert weighted_mean(list(zip(own, VALIDATION[:2], strict=True))) == pytest.approx(expected["loss"])


def test_all_callbacks_see_the_logs_of_all_ranks_at_test_end():
    class Seen(keras.callbacks.Callback):
        def on_test_end(self, logs=None):
            self.logs = logs

    def run(comm):
        seen = Seen()
        x, y = _share(_binary, comm.rank, VALIDATION)
        model = _model(1, "binary_crossentropy", [], _distributed())
        model.evaluate(x, y, 2, verbose=0, callbacks=[seen, hvd.callbacks.MetricAverageCallback()])
        return seen.logs

    expected = _plain_logs(_binary, "binary_crossentropy", list, VALIDATION)
    for logs in run_ranks(3, run):
        _assert_logs(logs, expected)


def test_the_metrics_keep_their_own_states():
    def run(comm):
        x, y = _share(_binary, comm.rank, VALIDATION)
        model = _model(1, "mse", [metrics.MeanAbsoluteError("mae")], _distributed(), run_eagerly=True)
        model.evaluate(x, y, 2, verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()])
        return float(model.get_metrics_result()["mae"]), float(np.mean(np.abs(x - y)))

    for own, expected in run_ranks(2, run):
        assert own == pytest.approx(expected, rel=1e-5)


# -- metrics and logs of the user's own ----------------------------------------------------------------


class Largest(keras.metrics.Metric):
    """The largest prediction, no sum of anything."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.largest = self.add_variable((), "zeros", name="largest")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.largest.assign(tf.maximum(self.largest, tf.reduce_max(y_pred)))

    def result(self):
        return self.largest + 0.0


class Ratio(keras.metrics.Metric):
    """Sum of labels / sum of predictions, and how many there were."""

    def __init__(self, name="ratio"):
        super().__init__(name=name)
        self.sums = self.add_variable((3,), "zeros", name="sums")

    def update_state(self, y_true, y_pred, sample_weight=None):
        size = tf.cast(tf.size(y_pred), "float32")
        self.sums.assign_add(
            tf.stack([tf.reduce_sum(tf.cast(y_true, "float32")), tf.reduce_sum(y_pred), size])
        )

    def result(self):
        return self.sums[0] / self.sums[1]


def _evaluate_own(comm, reductions):
    x, y = _share(_binary, comm.rank, VALIDATION)
    model = _model(1, "mse", [Largest(), Ratio()], _distributed(), run_eagerly=True)
    callback = hvd.callbacks.MetricAverageCallback(reductions=reductions)
    return model.evaluate(x, y, 2, verbose=0, return_dict=True, callbacks=[callback])


REDUCTIONS = {
    "by default": (None, {"largest": "mean", "ratio": "states"}),
    "by value": ({"ratio": "mean"}, {"largest": "mean", "ratio": "mean"}),
    "chosen": ({"largest": "max", "ratio": "states"}, {"largest": "max", "ratio": "states"}),
    "for validation": ({"largest": "min", "val_largest": "sum"}, {"largest": "sum", "ratio": "states"}),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_metrics_of_the_users_own(name):
    reductions, expected = REDUCTIONS[name]
    shares = [_share(_binary, rank, VALIDATION) for rank in range(2)]
    x, y = _whole(_binary, VALIDATION)
    largest = [np.max(x) for x, _ in shares]
    ratios = [np.sum(y) / np.sum(x) for x, y in shares]
    values = {
        "largest": {
            "mean": np.average(largest, weights=VALIDATION[:2]),
            "max": max(largest),
            "sum": sum(largest),
        },
        "ratio": {"mean": np.average(ratios, weights=VALIDATION[:2]), "states": np.sum(y) / np.sum(x)},
    }
    assert abs(values["ratio"]["mean"] - values["ratio"]["states"]) > 1e-3
    for logs in run_ranks(2, _evaluate_own, reductions):
        for metric, way in expected.items():
            assert logs[metric] == pytest.approx(values[metric][way], rel=1e-5)


class ArgIoU(metrics.MeanIoU):
    def update_state(self, y_true, y_pred, sample_weight=None):
        return super().update_state(y_true, tf.argmax(y_pred, -1), sample_weight)


class OfTwo(keras.Sequential):
    """Makes a result of two metrics, beside their own."""

    def get_metrics_result(self):
        results = super().get_metrics_result()
        return results | {"both": results["iou"] * results["sparse_categorical_accuracy"]}


class Renamed(keras.Sequential):
    """Its steps log a metric by another name, and something of the batch alone."""

    def __init__(self, layers):
        super().__init__(layers)
        self.tracker = metrics.Mean("tracked")

    def test_step(self, data):
        x, y = data
        self.tracker.update_state(tf.reduce_sum(self(x) * tf.cast(y, "float32"), axis=1))
        return {"error": self.tracker.result(), "rows": tf.cast(tf.shape(x)[0], "float32")}

    train_step = test_step


def _of_classes(cls):
    layer = keras.layers.Dense(4, use_bias=False, kernel_initializer="identity")
    model = cls([keras.Input((4,)), layer])
    chosen = [ArgIoU(4, name="iou"), metrics.SparseCategoricalAccuracy("sparse_categorical_accuracy")]
    chosen = chosen if cls is OfTwo else None  # Keras cannot read metrics that a step never updates
    model.compile(_distributed(), "sparse_categorical_crossentropy", metrics=chosen, run_eagerly=True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("callback", ["MetricAverageCallback", "AsOneProcess"])
def test_classes_that_inherit_and_results_made_of_several(callback):
    def run(comm):
        x, y = _share(_sparse, comm.rank, VALIDATION)
        average = getattr(hvd.callbacks, callback)(*[[]] * (callback == "AsOneProcess"))
        callbacks = [average]
        return _of_classes(OfTwo).evaluate(x, y, 2, verbose=0, return_dict=True, callbacks=callbacks)

    x, y = _whole(_sparse, VALIDATION)
    found, right = np.argmax(x, -1), y[:, 0].astype(int)
    cut = [np.sum((found == c) & (right == c)) for c in range(4)]
    joined = [np.sum((found == c) | (right == c)) for c in range(4)]
    iou = np.mean([a / b for a, b in zip(cut, joined, strict=True) if b])
    accuracy = np.mean(found == right)
    for logs in run_ranks(2, run):
        assert logs["iou"] == pytest.approx(iou, rel=1e-5)
        assert logs["both"] == pytest.approx(iou * accuracy, rel=1e-5)


def test_steps_of_the_users_own_are_weighted_by_samples():
    def run(comm):
        x, y = _share(_sparse, comm.rank, VALIDATION)
        model = _of_classes(Renamed)
        model.compile("sgd", run_eagerly=True)  # ranks that exchange gradients have as many steps
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        history = model.fit(x, y, 2, verbose=0, shuffle=False, callbacks=callbacks).history
        tested = model.evaluate(x, y, 2, verbose=0, return_dict=True, callbacks=callbacks)
        return {name: values[0] for name, values in history.items()}, tested

    x, y = _whole(_sparse, VALIDATION)
    # The last of each rank's batches has one row.
    expected = {"error": np.mean(np.sum(x * y, axis=1)), "rows": 1.0}
    for logs in [logs for pair in run_ranks(2, run) for logs in pair]:
        assert logs == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_what_is_averaged_by_value_is_told_once_on_rank_0():
    def run(comm):
        first = _evaluate_own(comm, None)
        second = _evaluate_own(comm, None)
        return first == second

    with pytest.warns(UserWarning, match="reductions=.'largest': 'states'") as caught:
        assert run_ranks(2, run) == [True, True]
    assert len([one for one in caught if "'largest'" in str(one.message)]) == 1


def test_logs_of_unequal_shares():
    """A step that logs what is no metric counts by the samples it has seen."""

    def run(comm):
        x, y = _share(_sparse, comm.rank, VALIDATION)
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        logs = _of_classes(Renamed).evaluate(x, y, 8, verbose=0, return_dict=True, callbacks=callbacks)
        return logs["rows"]

    assert run_ranks(2, run) == [pytest.approx((5 * 5 + 3 * 3) / 8)] * 2


def test_keras_metrics_by_value():
    """`reductions` overrides the sums; `Sum` by "max" is the largest rank's sum."""

    def run(comm):
        x, y = _share(_binary, comm.rank, VALIDATION)
        model = _model(1, "mse", [metrics.TruePositives(0.0)], _distributed(), run_eagerly=True)
        callback = hvd.callbacks.MetricAverageCallback(reductions={"true_positives": "max"})
        return model.evaluate(x, y, 2, verbose=0, return_dict=True, callbacks=[callback])["true_positives"]

    assert run_ranks(2, run) == [max(np.sum(_share(_binary, rank, VALIDATION)[1]) for rank in range(2))] * 2


def test_a_training_step_with_logs_of_its_own():
    """It logs the batch's loss where Keras would log the epoch's mean, and something that is no metric."""

    class Own(keras.Model):
        def __init__(self, rank):
            super().__init__()
            self.layer, self.rank = keras.layers.Dense(1), rank

        def call(self, x):
            return self.layer(x)

        def train_step(self, data):
            return {"loss": tf.constant(2.0 + self.rank), "extra": tf.constant(5.0 * self.rank)}

    def run(comm):
        model = Own(comm.rank)
        model.compile(_distributed(), "mse")
        x = np.ones((4, 2), "float32")
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        return model.fit(x, x[:, :1], 2, verbose=0, callbacks=callbacks).history

    assert run_ranks(2, run) == [{"loss": [2.5], "extra": [2.5]}] * 2


def _bare(comm, logs, **options):
    """One epoch's end without a model."""
    callback = hvd.callbacks.MetricAverageCallback(**options)
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, logs)
    return logs


def test_values_of_some_ranks():
    logs = [{"loss": 2.0}, None, {"loss": 5.0, "lr": 0.25, "note": "text"}]
    averaged = {"loss": 3.5, "lr": 0.25}
    expected = [averaged, None, averaged | {"note": "text"}]
    assert run_ranks(3, lambda comm: _bare(comm, logs[comm.rank])) == expected


def test_averaging_twice_is_averaging_once():
    values = [0.1, 0.7]  # their mean is not exact

    def run(comm):
        logs = {"loss": values[comm.rank]}
        once = dict(_bare(comm, logs))
        return once, _bare(comm, logs)

    for once, twice in run_ranks(2, run):
        assert once == twice == {"loss": pytest.approx(0.4)}


def test_weighted_means():
    assert weighted_mean([(1.0, 30), (2.0, 10)]) == 1.25
    assert weighted_mean([(1.0, 9), (float("nan"), 0)]) == 1.0  # a rank without samples does not count
    assert weighted_mean([(1.0, 0), (2.0, 0)]) == 1.5  # nobody has counted samples
    np.testing.assert_array_equal(weighted_mean([(np.array([1.0, 2]), 1), (np.array([2.0, 4]), 1)]), [1.5, 3])


# -- ranks that differ ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_on_one_rank_only():
    x, y = _share(_binary, 1, VALIDATION)

    def run(comm):
        model = _model(1, "mse", [metrics.AUC(num_thresholds=50)], _distributed(), run_eagerly=True)
        validation = {"validation_data": (x, y)} if comm.rank == 1 else {}
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        share = _share(_binary, comm.rank, TRAINING)
        history = model.fit(*share, len(share[0]), 2, **validation, verbose=0, callbacks=callbacks)
        return history.history

    first, second = run_ranks(2, run, timeout=30)
    assert first == second
    model = _model(1, "mse", [metrics.AUC(num_thresholds=50)], "sgd", run_eagerly=True)
    loss, auc = model.evaluate(x, y, verbose=0)
    assert first["val_loss"] == pytest.approx([loss] * 2, rel=1e-5)
    assert first["val_auc"] == pytest.approx([auc] * 2, rel=1e-5)
    assert len(first["loss"]) == 2


def _error(function, *arguments):
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return "no error"


def test_ranks_at_different_epochs():
    def run(comm):
        callback = hvd.callbacks.MetricAverageCallback()
        return _error(callback.on_epoch_end, comm.rank, {"loss": 1.0})

    first, second = run_ranks(2, run)
    assert first == second
    assert "rank 0: the end of epoch 1; rank 1: the end of epoch 2" in first


def test_different_metrics_under_one_name():
    def run(comm):
        chosen = [metrics.AUC(name="it")] if comm.rank else [metrics.MeanAbsoluteError(name="it")]
        model = _model(1, "mse", chosen, _distributed(), run_eagerly=True)
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        return _error(lambda: model.evaluate(*_share(_binary, 0, (4,)), verbose=0, callbacks=callbacks))

    first, second = run_ranks(2, run)
    assert first == second
    assert first.startswith("The metric 'it' must be the same on all ranks.")


def test_metrics_that_only_some_ranks_have():
    def run(comm):
        chosen = [metrics.TruePositives(0.0)] if comm.rank else []
        model = _model(1, "mse", chosen, _distributed(), run_eagerly=True)
        callbacks = [hvd.callbacks.MetricAverageCallback()]
        x, y = _share(_binary, comm.rank, VALIDATION)
        return model.evaluate(x, y, verbose=0, callbacks=callbacks, return_dict=True)

    first, second = run_ranks(2, run)
    assert first == second
    assert first["true_positives"] == np.sum(_share(_binary, 1, VALIDATION)[1])


def test_ranks_with_different_reductions():
    def run(comm):
        chosen = {"loss": ["sum", "mean"][comm.rank]}
        return _error(lambda: _bare(comm, {"loss": 1.0}, reductions=chosen))

    first, second = run_ranks(2, run)
    assert first == second
    assert first.startswith("`reductions` must be the same on all ranks.")


def test_states_of_what_is_no_metric():
    def run(comm):
        return _error(lambda: _bare(comm, {"lr": 1.0}, reductions={"lr": "states"}))

    for text in run_ranks(2, run):
        assert text == (
            "`reductions` may be 'states' for metrics of the model only. Received: 'lr', which is none."
        )


def test_wrong_reductions():
    with pytest.raises(ValueError, match=r"`reductions` must map .* Received: reductions={'auc': 'average'}"):
        hvd.callbacks.MetricAverageCallback(reductions={"auc": "average"})
    with pytest.raises(TypeError, match="Did you mean `reductions`"):
        hvd.callbacks.MetricAverageCallback(reduction={})


def test_names_that_nobody_logs():
    def run(comm):
        callback = hvd.callbacks.MetricAverageCallback(reductions={"acuracy": "mean"})
        callback.on_train_begin()
        callback.on_epoch_end(0, {"accuracy": 1.0})
        callback.on_train_end()

    with pytest.warns(UserWarning, match=r"names \['acuracy'\], but only \['accuracy'\] have been logged"):
        run_ranks(2, run)
