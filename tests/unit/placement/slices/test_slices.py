"""Every cut layer against the uncut one, and what the layers exchange; ranks as threads."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.keras_tools.slice_marks import mark_of
from hvdext.placement.slices import operators
from hvdext.testing import run_ranks
from tests.multiprocess.programs.slice_programs import (
    CASES,
    assert_equal,
    built,
    evaluated,
    floatx,
    whole_over,
)


@pytest.fixture
def float64():
    with floatx("float64"):
        yield


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_layers_equal_the_uncut_ones(name, float64):
    case = CASES[name]
    expected = evaluated(built(case), case)
    models = [built(case) for _ in range(case.size)]

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], case.rules)
        assert any(mark_of(v) for v in cut.variables)
        return evaluated(cut, case, whole_over(comm))

    for found in run_ranks(case.size, run):
        assert_equal(found, expected)


@pytest.mark.parametrize(
    "end", [lambda x, y: x + y, lambda x, y: keras.ops.concatenate([x, y]), lambda x, y: y[:, 0]]
)
def test_a_model_may_end_in_an_operation(end):
    """`x + y` of Keras tensors is no layer: it has neither an activation nor a regularizer."""
    keras.utils.set_random_seed(0)
    x = keras.Input((3, 4))
    y = keras.layers.Dense(4, name="down")(keras.layers.Dense(8, activation="relu", name="up")(x))
    model = keras.Model(x, end(x, y))
    models = [model, keras.models.clone_model(model)]
    rows = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("float32")
    expected = model(rows).numpy()

    def run(comm):
        return hvd.slice_layers(models[comm.rank], {"up": "column", "down": "row"})(rows).numpy()

    for found in run_ranks(2, run):
        np.testing.assert_allclose(found, expected, atol=1e-6)


# -- what is exchanged ---------------------------------------------------------------------------------


def test_operators_by_hand():
    """Two ranks; the loss is sum(w * output), the same on both."""

    def run(comm):
        mine = tf.constant([[1.0, 2.0]]) * (comm.rank + 1)
        whole = tf.constant([[1.0, 2.0, 3.0, 4.0]])
        with tf.GradientTape() as tape:
            tape.watch([mine, whole])
            copied = operators.copy(comm, [whole, whole], "hvdext.slices.test")
            loss = tf.reduce_sum(copied[0] * (comm.rank + 1.0)) + tf.reduce_sum(copied[1])
            loss += tf.reduce_sum(operators.reduce(comm, mine, "hvdext.slices.test") * [[5.0, 7.0]])
            joined = operators.gather(comm, mine, 0, "hvdext.slices.test")
            loss += tf.reduce_sum(joined * [[1.0, 10.0], [100.0, 1000.0]])
            part = operators.split(comm, whole, -1, "hvdext.slices.test")
            loss += tf.reduce_sum(part * 1000.0 * (comm.rank + 1))
        return joined.numpy(), part.numpy(), [g.numpy() for g in tape.gradient(loss, [mine, whole])]

    for rank, (joined, part, (by_mine, by_whole)) in enumerate(run_ranks(2, run)):
        np.testing.assert_array_equal(joined, [[1, 2], [2, 4]])
        np.testing.assert_array_equal(part, [[1, 2]] if rank == 0 else [[3, 4]])
        np.testing.assert_array_equal(by_mine, [[6, 17]] if rank == 0 else [[105, 1007]])
        # copy: 1 + 2 of the first, 1 + 1 of the second; split: each rank's part.
        np.testing.assert_array_equal(by_whole, [[1005, 1005, 2005, 2005]])


def test_a_transformer_layer_exchanges_twice_forward_and_twice_backward():
    keras.utils.set_random_seed(0)
    x = keras.Input((3, 8))
    y = keras.layers.MultiHeadAttention(2, 4, dropout=0.1, name="attention")(x, x)
    x1 = keras.layers.LayerNormalization()(keras.layers.Add()([x, y]))
    y = keras.layers.Dense(32, activation="gelu", name="up")(x1)
    y = keras.layers.Dense(8, name="down")(keras.layers.Dropout(0.1)(y))
    layer = keras.Model(x, keras.layers.Add()([x1, y]))
    models = [layer, keras.models.clone_model(layer)]
    rules = {"attention": "heads", "up": "column", "down": "row"}

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], rules)
        x = tf.ones([5, 3, 8])
        before = comm.traffic()["slices"]
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(cut(x, training=True) ** 2)
        forward = comm.traffic()["slices"]
        tape.gradient(loss, [x, *[v.value for v in cut.trainable_variables]])
        backward = comm.traffic()["slices"]
        names = [name for name, (calls, _) in comm.ledger.progress().items() if ".slices." in name and calls]
        return (
            [forward.calls - before.calls, backward.calls - forward.calls],
            [forward.bytes - before.bytes, backward.bytes - forward.bytes],
            [name for name in names if "weights" not in name],
        )

    message = 5 * 3 * 8 * 4  # float32; an all-reduce sends 2 (n - 1) / n of it
    for calls, sent, names in run_ranks(2, run):
        assert calls == [2, 2]
        assert sent == [2 * message, 2 * message]
        assert sorted(names) == [
            "hvdext.slices.attention.copy",
            "hvdext.slices.attention_attention_output.reduce",
            "hvdext.slices.down.reduce",
            "hvdext.slices.up.copy",
        ]


@keras.saving.register_keras_serializable(package="test_slices")
def _over_units(x):
    return x / (1 + keras.ops.sum(keras.ops.abs(x), axis=-1, keepdims=True))


@keras.saving.register_keras_serializable(package="test_slices")
def relu(x):
    """Named as one of Keras' that works element by element."""
    return _over_units(x)


@pytest.mark.parametrize(
    ("activations", "gathers"),
    [
        ((_over_units, None), True),
        ((None, _over_units), True),
        ((relu, None), True),
        ((None, keras.layers.Softmax()), True),
        ((keras.layers.LeakyReLU(0.1), "gelu"), False),
    ],
)
def test_parts_meet_before_an_activation_that_may_look_at_all_units(activations, gathers):
    inner, between = activations

    def make():
        up = keras.layers.Dense(8, inner, name="up")
        down = keras.layers.Dense(3, name="down")
        return keras.Sequential([keras.Input((6,)), up, keras.layers.Activation(between), down], name="mlp")

    models = [make(), make()]
    x = np.random.default_rng(0).normal(size=(5, 6)).astype("float32")
    expected = models[0](x)

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], {"up": "column", "down": "row"})
        return cut(x).numpy(), cut.get_layer("up").gather

    for found, gather in run_ranks(2, run):
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert gather is gathers


def test_masks_with_heads_and_scores_hold_all_heads():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2, 3, 4)).astype("float32")
    mask = generator.random((2, 4, 3, 3)) < 0.7
    plain = keras.layers.MultiHeadAttention(4, 2, value_dim=3)
    plain.build(x.shape, x.shape)
    outputs, scores = plain(x, x, attention_mask=mask, return_attention_scores=True)

    def run(comm):
        cut = hvd.SlicedMultiHeadAttention(4, 2, value_dim=3)
        cut.build(x.shape, x.shape)
        for own, whole in zip(cut.weights, plain.get_weights(), strict=True):
            marked = mark_of(own)
            own.assign(whole if marked is None else marked[0].of(whole))
        return [a.numpy() for a in cut(x, x, attention_mask=mask, return_attention_scores=True)]

    for found in run_ranks(2, run):
        np.testing.assert_allclose(found[0], outputs, atol=1e-6)
        np.testing.assert_allclose(found[1], scores, atol=1e-6)


# -- initial weights -----------------------------------------------------------------------------------


def test_first_weights_are_slices_of_those_of_the_uncut_layers():
    def make(sliced):
        keras.utils.set_random_seed(4)
        x, ids = keras.Input((6,)), keras.Input((3,), dtype="int32")
        if sliced:
            up, down = hvd.ColumnDense(8, name="up"), hvd.RowDense(4, "relu", name="down")
            table = hvd.SlicedEmbedding(10, 6, cut="columns", name="table")
            heads = hvd.SlicedMultiHeadAttention(2, 3, dropout=0.1, name="heads")
        else:
            up, down = keras.layers.Dense(8, name="up"), keras.layers.Dense(4, "relu", name="down")
            table = keras.layers.Embedding(10, 6, name="table")
            heads = keras.layers.MultiHeadAttention(2, 3, dropout=0.1, name="heads")
        y = table(ids)
        outputs = [down(up(x)), heads(y, y)]
        return keras.Model([x, ids], outputs)

    expected = {v.path: v.numpy() for v in make(False).weights}
    lock = threading.Lock()

    def run(comm):
        with lock:  # the seed is the process's
            model = make(True)
        return dict(
            zip(
                [v.path for v in model.weights],
                whole_over(comm)(model.weights, [v.numpy() for v in model.weights]),
                strict=True,
            )
        )

    for found in run_ranks(2, run):
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            np.testing.assert_array_equal(found[path], value)


def test_a_builder_gives_the_same_and_no_rank_holds_the_whole():
    biggest = []

    def build():
        x = keras.Input((6,))
        start = keras.initializers.HeNormal(seed=3)  # of its own: other ranks build in this process, too
        y = keras.layers.Dropout(0.1, seed=1)(keras.layers.Dense(64, kernel_initializer=start, name="up")(x))
        model = keras.Model(x, keras.layers.Dense(3, kernel_initializer="ones", name="down")(y))
        biggest.append(max(0 if v._value is None else v._value.shape.num_elements() for v in model.variables))
        return model

    expected = build()

    def run(comm):
        cut = hvd.slice_layers(build, {"up": "column", "down": "row"})
        return whole_over(comm)(cut.weights, [v.numpy() for v in cut.weights])

    for found in run_ranks(2, run):
        for mine, theirs in zip(found, expected.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert biggest == [6 * 64, 0, 0]  # on the ranks no variable has had a value


def test_a_builder_may_assign_values():
    given = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, name="up"), keras.layers.Dense(3)])
    for variable in given.weights:
        variable.assign(tf.random.normal(variable.shape))

    def build():
        model = keras.models.clone_model(given)
        model.set_weights(given.get_weights())
        return model

    def run(comm):
        cut = hvd.slice_layers(build, {"up": "column"})
        return whole_over(comm)(cut.weights, [v.numpy() for v in cut.weights])

    for found in run_ranks(2, run):
        for mine, theirs in zip(found, given.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)


# -- the loss of cut logits ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_cross_entropy_of_cut_logits(size):
    generator = np.random.default_rng(5)
    logits = (30 * generator.normal(size=(3, 5, 8))).astype("float32")
    labels = generator.integers(0, 8, (3, 5))
    weights = generator.random((3, 5)).astype("float32")
    with tf.GradientTape() as tape:
        whole = tf.constant(logits)
        tape.watch(whole)
        expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, whole, weights)
    gradient = np.split(tape.gradient(expected, whole).numpy(), size, axis=-1)
    accuracy = keras.metrics.SparseCategoricalAccuracy()(labels, logits)

    def run(comm):
        loss = hvd.SlicedSparseCategoricalCrossentropy()
        metric = hvd.SlicedSparseCategoricalAccuracy()
        with tf.GradientTape() as tape:
            mine = tf.constant(np.split(logits, size, axis=-1)[comm.rank])
            tape.watch(mine)
            value = loss(labels[..., np.newaxis], mine, weights)
        before = comm.traffic()["slices"].bytes
        by_mine = tape.gradient(value, mine).numpy()
        assert comm.traffic()["slices"].bytes == before  # the gradient costs nothing
        wrong = loss([[8], [-1]], tf.zeros([2, 8 // size]))
        return value.numpy(), by_mine, metric(labels, mine).numpy(), wrong.numpy()

    for rank, (value, by_mine, found, wrong) in enumerate(run_ranks(size, run)):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(by_mine, gradient[rank], atol=1e-6)
        np.testing.assert_allclose(found, accuracy)
        assert np.isnan(wrong)


@pytest.mark.slow
def test_vocabulary_sliced_training_equals_the_uncut_one():
    def make():
        keras.utils.set_random_seed(3)
        ids = keras.Input((4,), dtype="int32")
        y = keras.layers.Embedding(8, 4, name="table")(ids)
        return keras.Model(ids, keras.layers.Dense(8, name="logits")(y))

    x = np.arange(12).reshape(3, 4) % 8
    plain = make()
    plain.compile(
        keras.optimizers.SGD(0.5),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    expected = [plain.train_on_batch(x, (x + 1) % 8, return_dict=True) for _ in range(3)]
    models = [make(), make()]

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], {"table": "rows", "logits": "vocabulary"})
        assert cut.output_shape == (None, 4, 4)
        cut.compile(
            keras.optimizers.SGD(0.5),
            hvd.SlicedSparseCategoricalCrossentropy(),
            metrics=[hvd.SlicedSparseCategoricalAccuracy()],
        )
        return [cut.train_on_batch(x, (x + 1) % 8, return_dict=True) for _ in range(3)]

    for found in run_ranks(2, run):
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
