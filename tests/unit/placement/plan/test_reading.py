"""Keras models as graphs: paths, tensors, sizes worked out by hand, and models that cannot be read."""

import re
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.keras_tools.functional import calls_of, skeleton
from hvdext.placement.plan.reading import read

layers = keras.layers


def test_sizes_by_hand():
    inputs = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, strides=2, use_bias=False, name="depthwise")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(5, name="dense")(x)
    graph = read(keras.Model(inputs, x, name="cnn"))
    found = {
        layer.path: (
            layer.parameters,
            layer.weight_bytes,
            layer.trainable_bytes,
            layer.activation_bytes,
            layer.flops,
        )
        for layer in graph.layers
    }
    assert found == {
        "image": (0, 0, 0, 0, 0),
        # 3*3*3*4 + 4 weights; 6*6*4 floats out; each kernel element at 36 positions, times and plus
        "conv": (112, 448, 448, 576, 2 * 108 * 36),
        "norm": (16, 64, 32, 576, 144),
        "depthwise": (36, 144, 144, 64, 2 * 36 * 4),
        "flat": (0, 0, 0, 64, 16),
        "dense": (85, 340, 340, 20, 2 * 80),
    }
    assert [(t.name, t.shape, t.bytes, t.consumers) for t in graph.tensors[:2]] == [
        ("image", (None, 8, 8, 3), 768, ("conv",)),
        ("conv", (None, 6, 6, 4), 576, ("norm",)),
    ]
    assert graph.outputs == ("dense",)


def test_operations_by_hand():
    def flops(layer, *shapes):
        inputs = [keras.Input(shape) for shape in shapes]
        return read(keras.Model(inputs, layer(*inputs))).layers[-1].flops

    # Attention on 6 positions to 4: projections, then scores and their sums; 2 heads of width 3 and 5
    attention = layers.MultiHeadAttention(2, 3, value_dim=5)
    projections = 6 * 8 * 6 + 4 * 7 * (6 + 10) + 6 * 10 * 8
    assert flops(attention, (6, 8), (4, 7)) == 2 * (projections + 2 * 6 * 4 * (3 + 5))
    assert flops(layers.LSTM(3), (5, 2)) == 2 * 5 * (2 * 12 + 3 * 12)
    assert flops(layers.EinsumDense("abc,cde->abde", (7, 3, 2)), (7, 4)) == 2 * 7 * 4 * 3 * 2
    assert flops(layers.Conv2DTranspose(3, 2, strides=2, use_bias=False), (5, 5, 2)) == 2 * 25 * 2 * 2 * 2 * 3
    assert flops(layers.Embedding(100, 4), (6,)) == 24
    kept = read(keras.Model(*_attention_model())).by_path["attention"].activation_bytes
    # Out 6*8; queries and contexts 6*2*(3+3), keys and values as many, scores twice 2*6*6
    assert kept == 4 * (6 * 8 + 6 * 2 * 6 + 6 * 2 * 6 + 2 * 2 * 6 * 6)


def _attention_model():
    x = keras.Input((6, 8))
    return x, layers.MultiHeadAttention(2, 3, name="attention")(x, x)


def _family():
    """A Sequential called twice, once frozen, a functional model with a skip inside, and bare operations."""
    tower = keras.Sequential(
        [keras.Input((4,)), layers.Dense(4, name="a"), layers.BatchNormalization(name="b")], name="tower"
    )
    inside = keras.Input((4,), name="inside")
    skip = keras.Model(
        inside, [layers.Add(name="add")([inside, layers.Dense(4, name="d")(inside)]), inside], name="skip"
    )
    x, y = keras.Input((4,), name="x"), keras.Input((4,), name="y")
    first, same = skip(tower(x, training=False))
    second = tower(y)
    out = keras.ops.concatenate([first + second, same], axis=1)
    return keras.Model({"x": x, "y": y}, {"out": out, "second": second}, name="family")


def test_nested_models_are_flattened():
    model = _family()
    graph = read(model)
    added, joined = [layer.path for layer in graph.layers[-2:]]  # Keras numbers what has no name
    paths = ["x", "y", "tower/a", "tower/b", "skip/d", "skip/add", added, joined]
    assert [layer.path for layer in graph.layers] == paths
    assert [layer.kind for layer in graph.layers[-2:]] == ["Add", "Concatenate"]
    edges = [(a, b) for a, b, _ in graph.edges()]
    assert sorted(edges) == sorted(
        [
            ("x", "tower/a"),
            ("tower/a", "tower/b"),
            ("tower/b", "skip/d"),
            ("tower/b", "skip/add"),
            ("tower/b", joined),
            ("skip/d", "skip/add"),
            ("skip/add", added),
            ("y", "tower/a"),
            ("tower/a", "tower/b"),
            ("tower/b", added),
            (added, joined),
        ]
    )
    assert graph.by_path["tower/a"].flops == 2 * (2 * 16)  # both calls
    assert graph.outputs == (joined, "tower/b@1")
    assert hvd.plan(model, 3).is_forward_only


@pytest.mark.parametrize("training", [None, False, True])
def test_the_calls_compute_what_the_model_does(training):
    model = _family()
    model.get_layer("tower").get_layer("b").moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    data = {
        name: np.random.default_rng(i).normal(size=(3, 4)).astype("float32") for i, name in enumerate("xy")
    }
    state = model.get_weights()
    expected = model(data, training=training)
    model.set_weights(state)
    calls = calls_of(model)
    values = {name: tf.constant(data[name]) for name in calls.inputs}
    for call in calls.calls:
        call.run(values, training=training)
    for name, output in zip(calls.outputs, (expected["out"], expected["second"]), strict=True):
        np.testing.assert_allclose(values[name], output, atol=1e-6)


def test_layers_with_a_common_variable():
    class Tied(layers.Layer):
        def __init__(self, other, **kwargs):
            super().__init__(**kwargs)
            self.other = other

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.other.kernel))

    dense = layers.Dense(3, use_bias=False, name="dense")
    x = keras.Input((4,))
    model = keras.Model(x, Tied(dense, name="tied")(layers.ReLU(name="relu")(dense(x))))
    graph = read(model)
    assert graph.shared == (("dense", "tied"),)
    assert [layer.parameters for layer in graph.placed] == [12, 0, 0]
    with pytest.raises(ValueError, match="layers that can be apart, 1"):
        hvd.plan(model, 2)


def test_sizes_that_are_not_known_and_fixed_batches():
    x = keras.Input((None, 4), name="x")
    graph = read(keras.Model(x, layers.Dense(3, name="dense")(x)))
    assert [t.bytes for t in graph.tensors] == [16, 12]
    fixed = keras.Input(batch_shape=(8, 4), name="x")
    graph = read(keras.Model(fixed, layers.Dense(3, name="dense", dtype="float16")(fixed)))
    assert [t.bytes for t in graph.tensors] == [16, 6]


def test_slots_are_those_of_the_optimizer():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="a"), layers.Dense(2, name="b")])
    assert read(model).slots is None
    assert hvd.plan(model, 2).slots == 2
    for optimizer, slots in [("sgd", 0), (keras.optimizers.SGD(0.1, momentum=0.9), 1), ("adam", 2)]:
        model.compile(optimizer, "mse")
        assert hvd.plan(model, 2).slots == slots
    assert hvd.plan(model, 2, slots=5).slots == 5


def test_a_builder_allocates_nothing():
    def build():
        x = keras.Input((1000,))
        h = layers.Dropout(0.5, seed=1)(layers.Dense(10**6)(x))  # four gigabytes
        return keras.Model(x, layers.Dense(2)(h))

    keras.utils.clear_session()
    found = hvd.plan(build, 2)
    assert [cost.parameters for cost in found.costs] == [1001 * 10**6, 2 * 10**6 + 2]
    # The next model has the names that the plan knows, and Keras does not make up for the variables.
    model = skeleton(build)
    found.check(model)
    assert model.name == "functional"
    with keras.StatelessScope():
        pass
    assert all(v._value is None for v in model.variables)
    with pytest.raises(
        TypeError, match=r"`model` must be a function that returns a Keras model. Received: 3"
    ):
        hvd.plan(lambda: 3, 2)


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def test_models_that_cannot_be_read():
    with pytest.raises(
        ValueError, match=r"order of a subclassed model's layers .* functional model, .*Received: Own"
    ):
        hvd.plan(Own(), 2)
    with pytest.raises(ValueError, match=r"`model` must be built, .* Received: the Sequential model 'loose'"):
        hvd.plan(keras.Sequential([layers.Dense(2)], name="loose"), 2)
    with pytest.raises(
        TypeError, match=r"`model` must be a Keras model, or a function .* Received: 'model.keras'"
    ):
        hvd.plan("model.keras", 2)


def test_a_model_of_ones_own_inside_is_one_layer():
    x = keras.Input((4,))
    graph = read(keras.Model(x, layers.Dense(2, name="head")(Own()(x))))
    assert [(layer.kind, layer.parameters) for layer in graph.placed] == [("Own", 10), ("Dense", 6)]


def _transformer(blocks=12, width=64, length=128):
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    x = layers.Embedding(1000, width, name="embedding")(tokens)
    for i in range(blocks):
        normal = layers.LayerNormalization(name=f"norm_a{i}")(x)
        x = layers.Add(name=f"add_a{i}")(
            [x, layers.MultiHeadAttention(4, 16, name=f"attention_{i}")(normal, normal)]
        )
        normal = layers.LayerNormalization(name=f"norm_m{i}")(x)
        hidden = layers.Dense(4 * width, activation="gelu", name=f"up_{i}")(normal)
        x = layers.Add(name=f"add_m{i}")([x, layers.Dense(width, name=f"down_{i}")(hidden)])
    return keras.Model(tokens, layers.Dense(1000, name="head")(x), name="transformer")


@pytest.mark.parametrize(
    ("build", "parameters", "operations"),
    [
        (lambda: keras.applications.ResNet50(weights=None), 25_636_712, 7.7e9),  # 3.86 G multiplications
        (lambda: keras.applications.MobileNet(weights=None), 4_253_864, 1.14e9),  # 569 M multiplications
        (_transformer, 1000 * 64 + 12 * (4 * 64 * 65 + 256 * 65 + 64 * 257 + 256) + 65_000, None),
    ],
    ids=["ResNet50", "MobileNet", "transformer"],
)
def test_real_models_are_planned_in_a_second(build, parameters, operations):
    model = skeleton(build)
    for balance in ("parameters", "memory", "flops"):
        start = time.perf_counter()
        found = hvd.plan(model, 4, balance)
        assert time.perf_counter() - start < 1
        assert sum(cost.parameters for cost in found.costs) == parameters == model.count_params()
        assert max(cost.share for cost in found.costs) < 0.33
        assert found.is_forward_only
    if operations:
        assert sum(cost.flops for cost in found.costs) == pytest.approx(operations, rel=0.03)


@pytest.mark.slow
def test_measured():
    x = keras.Input((64,), name="x")
    h = layers.Dense(64, name="light")(x)
    h = layers.BatchNormalization(name="norm")(layers.Dropout(0.5, name="drop")(h))
    h = layers.Dense(4096, name="heavy")(h)
    model = keras.Model(x, layers.Dense(1, name="head")(h))
    before = [variable.numpy() for variable in model.variables]

    samples = np.ones((256, 64), "float32")
    found = hvd.plan(model, 2, "measured", samples=samples)
    seconds = {layer.path: layer.seconds for layer in found.graph.layers}
    assert seconds["heavy"] > seconds["light"]
    assert sum(seconds.values()) == pytest.approx(sum(cost.seconds for cost in found.costs))
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)

    for wrong, message in [
        ([samples, samples], "`samples` must hold one array for each of the model's 1 inputs. Received: 2."),
        (np.ones((2, 3)), "`samples` must have the inputs' shapes. Received: shape (2, 3) for 'x'"),
        ({"y": samples}, "`samples` must hold every input. Received: none for ['x']."),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            hvd.plan(model, 2, "measured", samples=wrong)
    loose = keras.Input((None, 3))
    with pytest.raises(ValueError, match="`samples` must be given where an input's shape is not known"):
        hvd.plan(keras.Model(loose, layers.Dense(1)(layers.ReLU()(loose))), 2, "measured")
    with pytest.raises(TypeError, match="`model` must be a built model"):
        hvd.plan(lambda: model, 2, "measured")
