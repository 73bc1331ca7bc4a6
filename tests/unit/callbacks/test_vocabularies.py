"""What preprocessing layers have learnt from one rank's share: taken along, or told."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

pytestmark = pytest.mark.slow

TEXTS = [["a b c", "a b", "a"], ["w x y", "w x", "w"]]


def _text(rank):
    layer = keras.layers.TextVectorization(max_tokens=5, output_sequence_length=2)
    layer.adapt(TEXTS[rank])
    return _model(keras.Input((), dtype="string"), layer), tf.constant(TEXTS[rank])


def _words(rank):
    layer = keras.layers.StringLookup(vocabulary=list(["ab", "wx"][rank]))
    return _model(keras.Input((1,), dtype="string"), layer), tf.constant([["a"], ["b"], ["w"]])


def _numbers(rank):
    layer = keras.layers.IntegerLookup(vocabulary=[10 + rank, 20])
    return _model(keras.Input((1,), dtype="int64"), layer), np.array([[10], [11], [20]])


def _bins(rank):
    layer = keras.layers.Discretization(num_bins=3)
    layer.adapt(np.arange(9.0)[:, None] * (1 + rank))
    return _model(keras.Input((1,)), layer), np.array([[1.0], [5.0], [9.0]], "float32")


def _model(inputs, layer):
    made = [inputs, layer, keras.layers.Embedding(5, 2), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential(made)
    model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    return model


KINDS = pytest.mark.parametrize(
    "make", [_text, _words, _numbers, _bins], ids=["text", "words", "numbers", "bins"]
)


def _fit(made, **options):
    model, x = made
    model.fit(x, np.ones((3, 1)), shuffle=False, verbose=0, **options)
    return model


@KINDS
def test_the_root_s_reaches_all(make):
    def run(comm):
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
        model = _fit(make(comm.rank), callbacks=callbacks)
        return model.predict(make(0)[1], verbose=0), model.layers[0](make(0)[1]).numpy()

    (first, indices), (second, theirs) = run_ranks(2, run)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(indices, theirs)
    np.testing.assert_array_equal(indices, make(0)[0].layers[0](make(0)[1]).numpy())


@KINDS
def test_without_a_broadcast_all_are_told(make):
    told = []

    def run(comm):
        try:
            _fit(make(comm.rank))
        except ValueError as error:
            told.append(str(error))

    run_ranks(2, run)
    assert len(set(told)) == 1
    assert len(told) == 2
    assert "model.fit, the beginning" in told[0]
    assert "vocabulary 0 (" in told[0]
    assert "entries, beginning with" in told[0]


def test_one_that_changes_between_two_trainings():
    def run(comm):
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)]
        model = _fit(_words(0), callbacks=callbacks)
        if comm.rank:
            model.layers[0].set_vocabulary(["b", "a"])
        _fit((model, _words(0)[1]), callbacks=callbacks)

    with pytest.raises(
        ValueError, match=r"(?s)vocabulary 0 \(StringLookup\): rank 0: .2 entries, beginning with b'a'"
    ):
        run_ranks(2, run)


def test_one_that_a_layer_cannot_hold():
    """One-hot outputs have a width that the next layer's weights were made for."""

    def run(comm):
        lookup = keras.layers.StringLookup(vocabulary=list("abc"[: 2 + comm.rank]), output_mode="one_hot")
        model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Dense(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
        x = tf.constant([["a"], ["b"], ["c"]])
        _fit((model, x), callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])

    with pytest.raises(ValueError, match=r"vocabular|variable"):
        run_ranks(2, run)


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_normalization_adapted_on_a_share(broadcast):
    def run(comm):
        normalization = keras.layers.Normalization()
        normalization.adapt(np.arange(6.0).reshape(3, 2) + comm.rank)
        model = keras.Sequential([keras.Input((2,)), normalization, keras.layers.Dense(1)])
        model.layers[1].set_weights([np.ones((2, 1)), np.zeros(1)])
        model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)), "mse")
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0)] if broadcast else []
        x = np.ones((3, 2), "float32")
        _fit((model, x), callbacks=callbacks)
        return model.predict(x, verbose=0)[0, 0]

    if broadcast:
        # mean (2, 3), variance 8 / 3: (1 - 2 + 1 - 3) / sqrt(8 / 3)
        np.testing.assert_allclose(run_ranks(2, run), [-3 / np.sqrt(8 / 3)] * 2, rtol=1e-6)
    else:
        with pytest.raises(
            ValueError, match=r"adapt them on all data, or put hvd.callbacks.Broadcast.*Normalization"
        ):
            run_ranks(2, run)


def test_an_elastic_state_takes_them_along():
    def run(comm):
        model, x = _words(comm.rank)
        hvd.elastic.KerasState(model).sync()
        return model.layers[0](x).numpy()

    first, second = run_ranks(2, run)
    np.testing.assert_array_equal(first, second)
