"""Models loaded for serving: signatures, batches of any size, stages of a pipeline."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext.serving.service import TensorSpec
from hvdext.serving.worker import served_model
from hvdext.serving.worker.signatures import NUMPY_TYPES
from tests.multiprocess.launching.launch import run_python

LAYERS = keras.layers


def _branched():
    """Two inputs; tensors that skip over several layers; three outputs, of which one comes twice."""
    keras.utils.set_random_seed(3)
    image = keras.Input((6, 6, 2), name="image")
    extra = keras.Input((3,), name="extra")
    x = LAYERS.Conv2D(4, 3, activation="relu", name="conv")(image)
    x = LAYERS.BatchNormalization(name="norm")(x)
    x = LAYERS.Flatten(name="flat")(x)
    a = LAYERS.Dense(8, activation="tanh", name="a")(x)
    b = LAYERS.Dense(8, name="b")(a)
    c = LAYERS.Add(name="sum")([a, b])
    d = LAYERS.Dense(8, activation="relu", name="d")(c)
    e = LAYERS.Concatenate(name="all")([d, a, extra])
    head = LAYERS.Dense(5, activation="softmax", name="head")(e)
    side = LAYERS.Dense(1, name="side")(LAYERS.Dropout(0.5)(b))
    model = keras.Model([image, extra], [head, side, head])
    for variable in model.variables:  # statistics of a normalization, too
        if variable.dtype == "float32":
            variable.assign(np.abs(np.random.default_rng(len(variable.path)).normal(size=variable.shape)) / 4)
    return model


def _batch(rows, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "image": generator.normal(size=(rows, 6, 6, 2)).astype("float32"),
        "extra": generator.normal(size=(rows, 3)).astype("float32"),
    }


@pytest.fixture(scope="module")
def branched(tmp_path_factory):
    path = tmp_path_factory.mktemp("branched") / "model.keras"
    model = _branched()
    model.save(path)
    return path, model


def test_whole_model(branched):
    path, model = branched
    served = served_model.load(path)
    assert served.platform == "keras"
    assert served.signature.inputs == (
        TensorSpec("image", "FP32", (None, 6, 6, 2)),
        TensorSpec("extra", "FP32", (None, 3)),
    )
    assert served.signature.outputs == (
        TensorSpec("head", "FP32", (None, 5)),
        TensorSpec("side", "FP32", (None, 1)),
        TensorSpec("head_1", "FP32", (None, 5)),
    )
    for rows in (1, 3, 64):
        outputs = served.run(_batch(rows))
        assert list(outputs) == ["head", "side", "head_1"]
        for one, other in zip(outputs.values(), model.predict_on_batch(_batch(rows)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    (answer,) = served._answers.values()
    assert answer.experimental_get_tracing_count() == 1


@pytest.mark.parametrize("stages", [2, 4])
def test_stages_give_what_the_whole_gives(branched, stages):
    path, model = branched
    parts = [served_model.load(path, stage=i, stages=stages) for i in range(stages)]
    tensors = _batch(5)
    crossing = []
    for part in parts:
        assert set(tensors) == {spec.name for spec in part.takes}
        tensors = part.run(tensors)
        crossing.append(set(tensors))
        assert part.signature == parts[0].signature
    assert list(tensors) == ["head", "side", "head_1"]
    for one, other in zip(tensors.values(), model.predict_on_batch(_batch(5)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert any("extra" in names for names in crossing[:-1])  # an input that skips over a stage
    if stages == 4:
        assert crossing[1] & crossing[2] - {"extra"}  # so does a tensor of the first layers


def test_a_stage_holds_its_own_weights_only(branched):
    path, model = branched
    held = []
    for i in range(4):
        function = served_model.load(path, stage=i, stages=4).function
        own = {v.path for v in function.layers.variables}
        held.append(sum(int(np.prod(v.shape)) for v in function.layers.weights))
        for variable in function.model.variables:
            assert (variable._value is not None) == (variable.path in own)
    assert all(count > 0 for count in held)
    assert sum(held) == model.count_params()


@pytest.mark.slow
def test_a_stage_never_holds_the_whole_model(tmp_path):
    width, layers, stages = 1500, 16, 4
    inputs = x = keras.Input((width,))
    for _ in range(layers):
        x = LAYERS.Dense(width, use_bias=False, kernel_initializer="identity")(x)
    keras.Model(inputs, x).save(tmp_path / "large.keras")
    program = """
import sys
import numpy as np
from hvdext.serving.worker import served_model
import keras
keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(sys.argv[2])
def memory(what):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
for path, width in ((sys.argv[2], 3), (sys.argv[1], 1500)):
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    stage = served_model.load(path, **({} if width == 3 else {"stage": 1, "stages": 4}))
    (out,) = stage.run({stage.takes[0].name: np.ones((1, width), "float32")}).values()
print(memory("VmHWM") - before, out.sum())
"""
    done = run_python(program, tmp_path / "large.keras", tmp_path / "small.keras", timeout=120)
    assert done.returncode == 0, done.stderr
    grown, result = map(float, done.stdout.split()[-2:])
    assert result == width
    whole = 4 * width * width * layers
    assert whole / stages < grown < 3 / 4 * whole


# -- SavedModels, types, refusals -----------------------------------------------------------------------


@pytest.mark.slow
def test_saved_model(branched, tmp_path):
    model = keras.Model(branched[1].inputs, {"head": branched[1].outputs[0], "side": branched[1].outputs[1]})
    model.export(tmp_path / "exported", verbose=False)
    served = served_model.load(tmp_path / "exported")
    assert served.platform == "tensorflow_savedmodel"
    assert {spec.name: spec for spec in served.signature.inputs} == {
        "image": TensorSpec("image", "FP32", (None, 6, 6, 2)),
        "extra": TensorSpec("extra", "FP32", (None, 3)),
    }
    assert {spec.name: spec.shape for spec in served.signature.outputs} == {
        "head": (None, 5),
        "side": (None, 1),
    }
    for rows in (1, 4):
        outputs = served.run(_batch(rows))
        for name, expected in model.predict_on_batch(_batch(rows)).items():
            np.testing.assert_allclose(outputs[name], expected, atol=1e-6)
    with pytest.raises(ValueError, match="a SavedModel has no layers"):
        served_model.load(tmp_path / "exported", stage=0, stages=2)


def test_text_goes_in_and_comes_out(tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.string, name="words")])
        def shout(self, words):
            return {"joined": tf.strings.reduce_join(words, axis=1), "length": tf.strings.length(words)}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "text"), signatures={"serving_default": module.shout})
    served = served_model.load(tmp_path / "text")
    assert served.signature.inputs == (TensorSpec("words", "BYTES", (None, 2)),)
    outputs = served.run({"words": np.array([[b"a\0", "\u00e4".encode()], [b"", b"\xff"]], object)})
    assert outputs["joined"].tolist() == [b"a\0\xc3\xa4", b"\xff"]
    assert outputs["length"].tolist() == [[2, 2], [0, 1]]
    assert outputs["joined"].dtype == object


def _saved(tmp_path, model):
    path = tmp_path / "model.keras"
    model.save(path)
    return path


def test_vocabularies_of_text_models(tmp_path):
    vectorize = LAYERS.TextVectorization(output_sequence_length=4, name="words")
    vectorize.adapt(["b b a", "b c"])
    inputs = keras.Input((), dtype="string", name="text")
    x = LAYERS.Embedding(8, 3)(vectorize(inputs))
    model = keras.Model(inputs, LAYERS.Dense(2)(LAYERS.Flatten()(x)))
    path = _saved(tmp_path, model)
    texts = np.array([b"a b", b"c c unknown"], object)
    expected = model(tf.constant(["a b", "c c unknown"])).numpy()
    served = served_model.load(path)
    assert served.signature.inputs[0] == TensorSpec("text", "BYTES", (None,))
    np.testing.assert_allclose(*served.run({"text": texts}).values(), expected, atol=1e-6)
    tensors = {"text": texts}
    for i in range(2):
        tensors = served_model.load(path, stage=i, stages=2).run(tensors)
    np.testing.assert_allclose(*tensors.values(), expected, atol=1e-6)


@pytest.mark.parametrize(("policy", "datatype"), [("float16", "FP16"), ("bfloat16", "FP32")])
def test_half_precision(tmp_path, policy, datatype):
    inputs = keras.Input((3,), dtype=policy, name="x")
    hidden = LAYERS.Dense(4, dtype=policy, name="hidden")(inputs)
    model = keras.Model(inputs, LAYERS.Dense(2, dtype=policy, name="y")(hidden))
    path = _saved(tmp_path, model)
    served = served_model.load(path)
    assert served.signature.inputs == (TensorSpec("x", datatype, (None, 3)),)
    assert served.signature.outputs == (TensorSpec("y", datatype, (None, 2)),)
    x = np.array([[1, 0.5, -2]], NUMPY_TYPES[datatype])
    expected = tf.cast(model(tf.cast(x, policy)), tf.float32).numpy()
    assert served.run({"x": x})["y"].dtype == x.dtype
    np.testing.assert_array_equal(served.run({"x": x})["y"].astype("float32"), expected)
    crossed = served_model.load(path, stage=0, stages=2).run({"x": x})
    assert crossed["hidden"].dtype == x.dtype
    last = served_model.load(path, stage=1, stages=2).run(crossed)
    np.testing.assert_array_equal(last["y"].astype("float32"), expected)


@pytest.mark.slow
def test_masks_cross_the_cut(tmp_path):
    inputs = keras.Input((4,), dtype="int32", name="ids")
    x = LAYERS.Embedding(5, 3, mask_zero=True, name="embed")(inputs)
    x = LAYERS.LSTM(6, return_sequences=True, name="one")(x)
    model = keras.Model(inputs, LAYERS.LSTM(2, name="two")(x))
    path = _saved(tmp_path, model)
    ids = np.array([[1, 2, 0, 0], [3, 0, 0, 0]], "int32")
    tensors = {"ids": ids}
    for i in range(2):
        tensors = served_model.load(path, stage=i, stages=2).run(tensors)
    np.testing.assert_allclose(tensors["two"], model.predict_on_batch(ids), atol=1e-6)
    assert (
        np.abs(tensors["two"] - model.predict_on_batch(np.array([[1, 2, 4, 4], [3, 4, 4, 4]]))).max() > 1e-3
    )


def test_names_of_nested_outputs(tmp_path):
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    x = LAYERS.Dense(3, name="dense")(LAYERS.Concatenate()([a, b]))
    y = LAYERS.Activation("relu", name="relu")(x)
    model = keras.Model({"a": a, "b": b}, {"last": y, "all": [x, y]})
    served = served_model.load(_saved(tmp_path, model))
    given = {name: np.array([[1.0, i]], "float32") for i, name in enumerate("ab")}
    expected = model.predict_on_batch(given)
    outputs = served.run(given)
    assert set(outputs) == {"last", "all_0", "all_1"}
    np.testing.assert_allclose(outputs["last"], expected["last"], atol=1e-6)
    np.testing.assert_allclose(outputs["all_0"], expected["all"][0], atol=1e-6)
    np.testing.assert_allclose(outputs["all_1"], expected["all"][1], atol=1e-6)


def test_names_of_sequential_models(tmp_path):
    model = keras.Sequential([keras.Input((3,), name="row"), LAYERS.Dense(2, name="score")])
    served = served_model.load(_saved(tmp_path, model))
    assert [spec.name for spec in (*served.signature.inputs, *served.signature.outputs)] == ["row", "score"]


def _no_batch_axis():
    x = keras.Input((3,))
    return keras.Model(x, keras.ops.mean(LAYERS.Dense(2, name="y")(x), axis=0))


def _closed_batch_axis():
    x = keras.Input(batch_shape=(4, 3), name="x")
    return keras.Model(x, LAYERS.Dense(2)(x))


def _other_rows():
    x = keras.Input((3,), name="x")
    return keras.Model(x, keras.ops.reshape(LAYERS.Dense(2)(x), (-1,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_batch_axis, r"must be open \(None\)\. Received: output 'mean\w*' of shape \(2,\)"),
        (_closed_batch_axis, r"must be open \(None\)\. Received: input 'x' of shape \(4, 3\)"),
        (
            _other_rows,
            r"as many rows as it is given\. Received: 5 rows; output 'reshape\w*' has the shape \(10,\)",
        ),
    ],
)
def test_models_without_a_batch_are_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        served_model.load(_saved(tmp_path, make()))


@keras.saving.register_keras_serializable("test_served_model")
class _Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = LAYERS.Dense(2)

    def call(self, x):
        return self.dense(x)


def test_what_cannot_be_served(tmp_path, branched):
    subclassed = _Subclassed()
    subclassed(np.ones((1, 3)))
    with pytest.raises(ValueError, match=r"_Subclassed .*Export it instead"):
        served_model.load(_saved(tmp_path, subclassed))
    branched[1].save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="without their model"):
        served_model.load(tmp_path / "model.weights.h5")
    code = keras.Sequential([keras.Input((3,)), LAYERS.Lambda(lambda x: x), LAYERS.Dense(1)])
    path = _saved(tmp_path, code)
    for options in ({}, {"stage": 0, "stages": 2}):
        with pytest.raises(ValueError, match="safe_mode"):
            served_model.load(path, **options)
    with pytest.raises(ValueError, match=r"`stage` must lie in 0 to 1\. Received: stage=2"):
        served_model.load(branched[0], stage=2, stages=2)
    with pytest.raises(ValueError, match="`places`"):
        served_model.load(branched[0], stage=0, stages=40)


def test_wrong_inputs_of_a_batch(branched):
    served = served_model.load(branched[0])
    batch = _batch(2)
    with pytest.raises(ValueError, match=r"must hold \['image', 'extra'\]\. Received: \['image'\]"):
        served.run({"image": batch["image"]})
    with pytest.raises(ValueError, match=r"'extra' must be of type FP32\. Received: float64"):
        served.run({**batch, "extra": batch["extra"].astype("float64")})
    served.run(batch)
