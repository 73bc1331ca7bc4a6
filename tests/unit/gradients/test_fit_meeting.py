"""What callbacks and arguments do on one rank of a `fit` is told to all before it makes them drift apart."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.guards import Guards
from hvdext.keras_tools.facts import loss_facts
from hvdext.keras_tools.numbering import renumbered
from hvdext.testing import run_ranks

pytestmark = pytest.mark.slow

X = np.arange(16, dtype="float32").reshape(8, 2) / 16


def _model(**compiled):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="body"), keras.layers.Dense(1)])
    model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), **({"loss": "mse"} | compiled))
    return model


def _fit(model, **options):
    model.fit(X, X[:, :1], batch_size=4, shuffle=False, verbose=0, **options)


def _refused(run, size=2):
    """The error that all ranks get."""
    told = []

    def one(comm):
        try:
            run(comm)
        except ValueError as error:
            told.append(str(error))

    run_ranks(size, one)
    assert len(told) == size
    assert len(set(told)) == 1
    return told[0]


def _callback(**hooks):
    return keras.callbacks.LambdaCallback(**hooks)


def test_a_learning_rate_that_follows_one_rank_s_own_metrics():
    epochs = []

    def run(comm):
        model = _model()
        plateau = keras.callbacks.ReduceLROnPlateau(
            "val_loss", patience=1, factor=0.1, min_delta=0.0 if comm.rank else 100.0
        )
        seen = _callback(on_epoch_begin=lambda epoch, logs: comm.rank or epochs.append(epoch))
        _fit(model, validation_data=(X, X[:, :1]), epochs=8, callbacks=[plateau, seen])

    text = _refused(run)
    assert "learning_rate (callbacks that" in text
    assert "AsOneProcess" in text
    assert "rank 0: [0.00999" in text
    assert "rank 1: [0.1" in text
    assert epochs == [0, 1, 2]  # changed at the end of the second epoch, told before the third trains


def test_a_learning_rate_that_has_changed_in_the_last_epoch():
    def run(comm):
        model = _model()

        def change(epoch, logs):
            if comm.rank:
                model.optimizer.learning_rate = 0.05

        _fit(model, callbacks=[_callback(on_epoch_end=change)])

    assert "model.fit, the end" in _refused(run)


def test_a_learning_rate_follows_the_first_rank_if_told_so():
    def run(comm):
        Guards(on_divergence="broadcast").keep_for(comm)
        model = _model()
        rates = []

        def change(epoch, logs):
            rates.append(float(model.optimizer.learning_rate.numpy()))
            model.optimizer.learning_rate = 0.5 + comm.rank

        _fit(model, epochs=3, callbacks=[_callback(on_epoch_end=change)])
        return rates

    np.testing.assert_allclose(run_ranks(2, run), [[0.1, 0.5, 0.5]] * 2)


def test_one_rank_stops_early():
    def run(comm):
        model = _model()

        def stop(epoch, logs):
            model.stop_training = comm.rank == 0 and epoch == 1

        _fit(model, epochs=5, callbacks=[_callback(on_epoch_end=stop)])

    text = _refused(run)
    assert "rank 0: the end (stop_training was set); rank 1: before epoch 3" in text
    assert "EarlyStopping" in text
    assert "hvd.callbacks.AsOneProcess([...]), on every rank" in text


def test_all_ranks_stop_early():
    def run(comm):
        model = _model()
        seen = []

        def stop(epoch, logs):
            seen.append(epoch)
            model.stop_training = epoch == 1

        _fit(model, epochs=5, callbacks=[_callback(on_epoch_end=stop)])
        return seen

    assert run_ranks(2, run) == [[0, 1]] * 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (lambda r: {"epochs": 3, "initial_epoch": 2 * r}, "rank 0: before epoch 1; rank 1: before epoch 3"),
        (lambda r: {"epochs": 1 + r}, "epochs: rank 0: 1; rank 1: 2"),
        (lambda r: {"steps_per_epoch": 1 + r}, "UnevenBatches lets them differ): rank 0: 1; rank 1: 2"),
    ],
)
def test_arguments_that_differ(options, told):
    assert told in _refused(lambda comm: _fit(_model(), **options(comm.rank)))


class Weighted(keras.losses.Loss):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, y_true, y_pred):
        return self.factor * keras.ops.mean((y_true - y_pred) ** 2, -1)


def _made(factor):
    def loss(y_true, y_pred):
        return factor * keras.ops.mean((y_true - y_pred) ** 2, -1)

    return loss


@pytest.mark.parametrize(
    ("compiled", "told"),
    [
        (lambda r: {"loss": "mse", "loss_weights": [1.0 + r]}, "compile(loss_weights=...): rank 0: [1.0]"),
        (lambda r: {"loss": Weighted(1.0 + r)}, "'factor': 2.0"),
        (lambda r: {"loss": _made(1.0 + r)}, "'factor': 2.0"),
        (lambda r: {"loss": keras.losses.Huber(delta=1.0 + r)}, "'delta': 2.0"),
        (lambda r: {"loss": ["mse", "mae"][r]}, "compile(loss=...): rank 0: 'mse'; rank 1: 'mae'"),
    ],
    ids=["weights", "attribute", "closure", "argument", "another"],
)
def test_losses_that_differ(compiled, told):
    assert told in _refused(lambda comm: _fit(_model(**compiled(comm.rank))))


def test_a_loss_weight_that_changes_meanwhile():
    def run(comm):
        weight = tf.Variable(1.0)
        change = _callback(on_epoch_end=lambda epoch, logs: weight.assign_add(float(comm.rank)))
        _fit(_model(loss=_made(weight)), epochs=3, callbacks=[change])

    assert "before epoch 2" in _refused(run)


def test_a_layer_that_is_frozen_on_one_rank():
    def run(comm):
        model = _model()

        def freeze(epoch, logs):
            model.layers[0].trainable = comm.rank == 0

        _fit(model, epochs=3, callbacks=[_callback(on_epoch_end=freeze)])

    assert "frozen (trainable=False): rank 0: []; rank 1: ['body']" in _refused(run)


def test_nobody_meets_if_told_so():
    def run(comm):
        Guards(check_every=0).keep_for(comm)
        _fit(_model())
        return comm.traffic()

    assert all("fit" not in key for traffic in run_ranks(2, run) for key in traffic)


class Reordered(keras.utils.PyDataset):
    """Shuffled anew after each epoch, as one's own data sets like to do it."""

    def __init__(self, seed):
        super().__init__()
        self._random = np.random.default_rng(seed)
        self._order = np.arange(8)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        picked = self._order[2 * index : 2 * index + 2]
        noise = np.random.default_rng().normal(size=(2, 2)).astype("float32")  # is no other order
        return X[picked] + noise, picked[:, None].astype("float32")

    def on_epoch_end(self):
        self._random.shuffle(self._order)


def _of(indices):
    return indices.map(lambda i: (tf.gather(X, i), tf.cast(i, tf.float32)[None]))


def _drawn(seed):
    random = np.random.default_rng(seed)

    def draw():
        yield from random.permutation(8)

    return _of(tf.data.Dataset.from_generator(draw, output_signature=tf.TensorSpec([], tf.int64)))


@pytest.mark.parametrize(
    "share",
    [
        lambda seed: hvd.data.shard(Reordered(seed)),
        lambda seed: hvd.data.shard(_drawn(seed), batch_size=2).prefetch(1),
    ],
    ids=["PyDataset", "generator"],
)
def test_orders_that_only_show_when_they_are_drawn(share):
    def run(seed):
        _model().fit(share(seed), epochs=3, shuffle=False, verbose=0)

    run_ranks(2, lambda comm: run(1))
    assert "the same order on every rank" in _refused(lambda comm: run(comm.rank))


def test_a_pass_that_one_rank_alone_has_begun():
    """A seeded shuffle is drawn anew in each pass: who looks at a batch alone is one order ahead."""

    def run(comm):
        data = hvd.data.shard(_of(tf.data.Dataset.range(8).shuffle(8, seed=1)), batch_size=2)
        if comm.rank:
            next(iter(data))
            data.set_epoch(0)
        _model().fit(data, epochs=3, shuffle=False, verbose=0)

    assert "the same order on every rank" in _refused(run)


def test_names_without_the_process_s_own_numbers():
    assert renumbered(["dense_3/kernel", "dense_4/kernel"]) == renumbered(["dense/kernel", "dense_1/kernel"])
    assert renumbered(["dense_1", "dense"]) == ["dense_1", "dense"]
    assert renumbered(["a_2/b_5", "a_2/b_7", "a_9/b_5"]) == ["a/b", "a/b_1", "a_1/b"]
    assert renumbered(["block_1a", "x_"]) == ["block_1a", "x_"]


def test_what_a_loss_is_made_of():
    facts = loss_facts(_model(loss=Weighted(3.0), loss_weights=[0.5]))
    assert facts["compile(loss_weights=...)"] == [0.5]
    assert facts["compile(loss=...)"][1]["factor"] == 3.0


def _scaled(y, y_pred, factor=1.0):
    return factor * keras.losses.mean_squared_error(y, y_pred)


def test_what_differs_from_process_to_process_is_no_fact():
    """Keras notes an address in each of its functions."""
    facts = loss_facts(_model(loss=keras.losses.mean_squared_error))
    assert facts["compile(loss=...)"] == ["mean_squared_error", {}]


def test_what_a_partial_function_is_given_is_one():
    loss, other = (functools.partial(_scaled, factor=factor) for factor in (2.0, 3.0))
    assert loss_facts(_model(loss=loss)) == loss_facts(_model(loss=functools.partial(_scaled, factor=2.0)))
    assert loss_facts(_model(loss=loss)) != loss_facts(_model(loss=other))
