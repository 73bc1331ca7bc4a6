"""Models whose rows look at each other are found when they are loaded, and only these."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext.serving.worker.served_model import ServedModel
from hvdext.serving.worker.signatures import keras_ports, port, saved_model_ports

LAYERS = keras.layers
OPS = keras.ops


def served(
    function, variables=(), gives=(("y", "float32", (None, 4)),), takes=(("x", "float32", (None, 4)),)
):
    """A model that computes a function of tensors."""

    def answer(tensors):
        made = function(*tensors)
        return list(made) if isinstance(made, tuple) else [made]

    model = ServedModel(
        answer, [port(*one) for one in takes], [port(*one) for one in gives], "test", variables
    )
    model.examine()
    return model


def why(function, **options):
    """Why its requests are computed one by one."""
    return served(function, **options).signature.alone


INTS = {"gives": (("y", "int64", (None,)),)}


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda x: x - tf.reduce_mean(x, 0), {}),
        (lambda x: tf.nn.softmax(x, 0), {}),
        (lambda x: x / tf.reduce_max(tf.abs(x), 0), {}),
        (lambda x: x - x[:1], {}),
        (lambda x: x - x[-1:], {}),
        (lambda x: tf.cumsum(x), {}),
        (lambda x: tf.roll(x, 1, 0), {}),
        (lambda x: tf.sort(x, 0), {}),
        (lambda x: x + tf.cast(tf.reduce_sum(tf.where(x > 100, 1, 0)), tf.float32) + 0.01 * x[::-1], {}),
        (lambda x: x / tf.cast(tf.shape(x)[0], tf.float32), {}),  # nothing but the size tells
        (lambda x: tf.math.log(x - tf.reduce_min(x) + 1.0), {}),
        (lambda x: tf.math.log(x) - tf.reduce_mean(tf.math.log(x), 0), {}),  # of numbers above 0
        (lambda x: tf.argmax(x - tf.reduce_mean(x, 0), -1), INTS),
        (  # how many rows of the batch are the same
            lambda x: tf.reduce_sum(tf.cast(tf.reduce_all(x[:, None] == x[None], -1), tf.int64), 1),
            INTS,
        ),
    ],
)
def test_rows_that_look_at_each_other(function, options):
    assert "depends on" in why(function, **options)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (lambda x: x - tf.reduce_mean(x, 1, keepdims=True), {}),
        (lambda x: tf.matmul(x, tf.random.stateless_normal((4, 4), (1, 2))), {}),
        (lambda x: x + tf.random.normal(tf.shape(x)), {}),  # what is drawn at random is no dependence
        (lambda x: tf.random.categorical(x, 1)[:, 0], INTS),
        (lambda x: tf.argmax(x, -1), INTS),
        (lambda x: tf.zeros_like(x), {}),
        (lambda x: tf.math.log(x), {}),
        (lambda x: tf.cast(tf.cast(x, tf.bfloat16) * 3, tf.bfloat16), {}),
        (
            lambda i: tf.cast(i % 2 == 0, tf.bool),
            {"takes": (("x", "int8", (None,)),), "gives": (("y", "bool", (None,)),)},
        ),
        (
            lambda i: tf.gather(tf.eye(3), i),
            {"takes": (("x", "int32", (None,)),), "gives": (("y", "float32", (None, 3)),)},
        ),
    ],
)
def test_rows_that_do_not(function, options):
    assert why(function, **options) == ""


def test_what_is_rarely_random_is_no_dependence():
    def rarely(x):
        return x + tf.cast(tf.random.uniform(tf.shape(x)) < 0.02, tf.float32)

    assert [why(rarely) for _ in range(4)] == [""] * 4


def test_what_is_random_and_looks_at_the_rows_beside_it():
    """With its generator set back, the same noise comes again: what else differs is no chance."""
    for centred in (False, True):
        seeds = keras.random.SeedGenerator(3)

        def function(x, centred=centred, seeds=seeds):
            x = x - tf.reduce_mean(x, 0) if centred else x
            return x + keras.random.normal(tf.shape(x), seed=seeds)

        before = np.asarray(seeds.state).copy()
        assert bool(why(function, variables=[seeds.state])) is centred
        np.testing.assert_array_equal(np.asarray(seeds.state).copy(), before)  # as it was loaded


def test_answers_that_depend_on_the_batch_before_are_refused():
    count = tf.Variable(0.0, trainable=False, name="count")
    with pytest.raises(ValueError, match=r"whatever it has been asked before.* depends on 'count:0'"):
        served(lambda x: x * count.assign_add(1.0), variables=[count])
    assert count.numpy() == 0
    # One that only counts is served.
    assert why(lambda x: x + 0 * count.assign_add(1.0), variables=[count]) == ""
    assert count.numpy() == 0


TEXT = {"takes": (("x", "string", (None,)),)}


def _lengths(texts):
    return tf.strings.length(tf.strings.split(texts).to_tensor())  # as wide as the longest


def test_texts_that_are_padded_to_the_longest():
    gives = (("y", "float32", (None,)),)
    padded = why(lambda x: tf.reduce_mean(tf.cast(_lengths(x), tf.float32), 1), gives=gives, **TEXT)
    assert "depends on the other rows" in padded
    masked = why(lambda x: tf.cast(tf.reduce_sum(_lengths(x), 1), tf.float32), gives=gives, **TEXT)
    assert masked == ""
    wide = why(_lengths, gives=(("y", "int32", (None, None)),), **TEXT)
    assert "depends on the other rows" in wide


def test_texts_of_other_kinds():
    gives = (("y", "float32", (None,)),)

    def pictures(texts):
        decode = lambda text: tf.reduce_mean(tf.cast(tf.io.decode_image(text), tf.float32))  # noqa: E731
        return tf.map_fn(decode, texts, fn_output_signature=tf.float32)

    assert why(lambda x: tf.strings.to_number(x), gives=gives, **TEXT) == ""
    assert why(pictures, gives=gives, **TEXT) == ""
    assert "depends" in why(lambda x: pictures(x) - tf.reduce_mean(pictures(x)), gives=gives, **TEXT)

    def example(texts):
        return tf.io.parse_example(texts, {"f": tf.io.FixedLenFeature([], tf.float32)})["f"]

    assert "none of the random rows" in why(example, gives=gives, **TEXT)


def test_what_fails_in_a_smaller_batch():
    def pairs(x):
        with tf.control_dependencies([tf.debugging.assert_greater(tf.shape(x)[0], 1)]):
            return tf.identity(x)

    assert "it answers 5 rows together, but not 1 of them" in why(pairs)


def _of(inputs, outputs):
    model = keras.Model(keras.tree.flatten(inputs), outputs)
    takes, gives = keras_ports(model)
    one = ServedModel(
        lambda tensors: keras.tree.flatten(model(list(tensors))), takes, gives, "keras", model.variables
    )
    one.examine()
    return one


def test_layers_of_keras():
    x = keras.Input((4,))
    dense = LAYERS.Dense(8, activation="relu")(x)
    assert _of(x, LAYERS.BatchNormalization()(dense)).signature.alone == ""
    training = LAYERS.BatchNormalization(name="norm")
    model = _of(x, training(dense, training=True))
    assert "depends on the other rows of the batch (output 'norm')" in model.signature.alone
    np.testing.assert_array_equal(training.moving_mean, np.zeros(8))  # trying has changed nothing
    assert _of(x, LAYERS.Dropout(0.5)(dense, training=True)).signature.alone == ""


def test_vocabularies_of_keras():
    """Lookups that know no other words, and numbers that must be below a limit."""
    word, number = keras.Input((), dtype="string"), keras.Input((), dtype="int64")
    user = keras.Input((), dtype="int32")
    a = LAYERS.StringLookup(vocabulary=["x y", "z"], num_oov_indices=0, output_mode="one_hot")(word)
    b = LAYERS.IntegerLookup(vocabulary=[70, 80, 90], num_oov_indices=0, output_mode="one_hot")(number)
    c = LAYERS.Embedding(3, 2)(user)
    together = LAYERS.Concatenate()([a, b, c])
    assert _of([word, number, user], LAYERS.Dense(2)(together)).signature.alone == ""
    centred = together - OPS.mean(together, 0, keepdims=True)
    assert "depends" in _of([word, number, user], centred).signature.alone


def test_texts_vectorized_by_keras():
    text = keras.Input((), dtype="string")
    ids = LAYERS.TextVectorization(vocabulary=["a", "b", "c"])(text)
    x = LAYERS.Embedding(6, 3)(ids)
    assert "depends" in _of(text, LAYERS.GlobalAveragePooling1D()(x)).signature.alone
    ids = LAYERS.TextVectorization(vocabulary=["a", "b", "c"], output_sequence_length=12)(text)
    x = LAYERS.Embedding(6, 3)(ids)
    assert _of(text, LAYERS.GlobalAveragePooling1D()(x)).signature.alone == ""


def test_open_lengths_are_tried_too():
    ids = keras.Input((None,), dtype="int32")
    x = LAYERS.Embedding(5, 3)(ids)
    assert _of(ids, LAYERS.GlobalAveragePooling1D()(x)).signature.alone == ""
    assert "depends" in _of(ids, OPS.mean(x, 1) - OPS.mean(x, (0, 1))).signature.alone
    with pytest.raises(ValueError, match="as many rows as it is given"):
        _of(ids, OPS.reshape(x, (-1, 3)))


def test_ragged_and_sparse_tensors_are_refused():
    for spec in (tf.RaggedTensorSpec((None, None)), tf.SparseTensorSpec((None, 3))):
        with pytest.raises(ValueError, match=r"dense tensors.*Received: tensor 'x', a (Ragged|Sparse)Tensor"):
            saved_model_ports({"x": spec})
    with pytest.raises(ValueError, match=r"dense tensors.*Received: output 'y', a RaggedTensor"):
        served(tf.strings.split, gives=(("y", "string", (None, None)),), **TEXT)
