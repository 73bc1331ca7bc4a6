"""Models that Keras tells little of, or something else than they do; SavedModels with several signatures."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from hvdext.inference.deploy.saved_model import SavedModel
from hvdext.serving.service import TensorSpec
from hvdext.serving.worker import served_model

LAYERS = keras.layers


def _saved(tmp_path, model):
    path = tmp_path / "model.keras"
    model.save(path)
    return path


def test_sequential_models_that_were_built_by_their_first_batch(tmp_path):
    """Keras keeps that batch's size in the file; batches of any size are answered all the same."""
    x = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")
    model = keras.Sequential([LAYERS.Dense(4, activation="relu"), LAYERS.Dense(2, name="y")])
    model(x[:2])
    path = _saved(tmp_path, model)
    assert keras.models.load_model(path).inputs[0].shape == (2, 3)
    served = served_model.load(path)
    assert [spec.shape for spec in (*served.signature.inputs, *served.signature.outputs)] == [
        (None, 3),
        (None, 2),
    ]
    first, last = (served_model.load(path, stage=i, stages=2) for i in range(2))
    for rows in (1, 5):
        expected = model(x[:rows]).numpy()
        given = {served.takes[0].name: x[:rows]}
        np.testing.assert_allclose(served.run(given)["y"], expected, atol=1e-6)
        np.testing.assert_allclose(last.run(first.run(given))["y"], expected, atol=1e-6)


def test_sequential_models_that_need_the_size_or_were_never_built_are_refused(tmp_path):
    stateful = keras.Sequential([LAYERS.SimpleRNN(2, stateful=True)])
    stateful(np.ones((2, 4, 3), "float32"))
    with pytest.raises(ValueError, match=r"must be open \(None\)\. Received: input .* of shape \(2, 4, 3\)"):
        served_model.load(_saved(tmp_path, stateful))
    with pytest.warns(UserWarning, match="not yet been built"):
        path = _saved(tmp_path, keras.Sequential([LAYERS.Dense(1)], name="new"))
    with pytest.raises(ValueError, match=r"must have been built before it was saved.*Received: 'new'"):
        served_model.load(path)


def _label(path, stages=()):
    x = keras.Input((2,), name="x")
    best = keras.ops.argmax(LAYERS.Dense(2, kernel_initializer="identity", name="scores")(x), -1)
    words = LAYERS.StringLookup(vocabulary=["cat", "dog"], invert=True, num_oov_indices=0, name="label")
    keras.Model(x, words(best)).save(path)


def test_labels_as_words(tmp_path):
    """Keras takes the words for numbers; what the graph gives decides."""
    _label(tmp_path / "label.keras")
    x = np.array([[0, 1], [1, 0]], "float32")
    served = served_model.load(tmp_path / "label.keras")
    assert served.signature.outputs == (TensorSpec("label", "BYTES", (None,)),)
    assert served.run({"x": x})["label"].tolist() == [b"dog", b"cat"]
    with pytest.raises(
        ValueError, match=r"must not give string tensors .* or return them\. Received: 'label'"
    ):
        served_model.load(tmp_path / "label.keras", stage=0, stages=2)


@keras.saving.register_keras_serializable("test_model_kinds")
class _Mislabelled(LAYERS.Layer):
    """Gives whole numbers, and lets Keras take them for others."""

    def call(self, x):
        return tf.cast(tf.round(x), tf.int16)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "float32")


def test_the_type_of_an_output_is_the_graphs(tmp_path):
    x = keras.Input((2,), name="x")
    served = served_model.load(_saved(tmp_path, keras.Model(x, _Mislabelled(name="y")(x))))
    assert served.signature.outputs == (TensorSpec("y", "INT16", (None, 2)),)
    assert served.run({"x": np.array([[1.2, -3]], "float32")})["y"].tolist() == [[1, -3]]


@keras.saving.register_keras_serializable("test_model_kinds")
class _PlusIfThere(LAYERS.Layer):
    def call(self, x, more=None):
        return x if more is None else x + 10 * more

    def compute_output_shape(self, x_shape, more_shape=None):
        return x_shape


@pytest.mark.parametrize("in_dict", [False, True])
def test_inputs_that_may_be_missing(tmp_path, in_dict):
    x, more = keras.Input((2,), name="x"), keras.Input((2,), name="more", optional=True)
    inputs = {"x": x, "more": more} if in_dict else [x, more]
    path = _saved(tmp_path, keras.Model(inputs, _PlusIfThere(name="y")(x, more)))
    served = served_model.load(path)
    assert {spec.name: spec.optional for spec in served.signature.inputs} == {"x": False, "more": True}
    assert served.signature.bare.name == "x"
    one = np.array([[1, 2]], "float32")
    np.testing.assert_array_equal(served.run({"x": one})["y"], [[1, 2]])
    np.testing.assert_array_equal(served.run({"x": one, "more": one})["y"], [[11, 22]])
    with pytest.raises(ValueError, match="must hold"):
        served.run({"more": one})


def test_rows_that_look_at_each_other_are_found_at_load(tmp_path):
    x = keras.Input((3,), name="x")
    dense = LAYERS.Dense(4, name="dense")(x)
    path = _saved(tmp_path, keras.Model(x, dense - keras.ops.mean(dense, 0, keepdims=True)))
    assert "depends on the other rows of the batch" in served_model.load(path).signature.alone
    stages = [served_model.load(path, stage=i, stages=2) for i in range(2)]
    assert any(stage.signature.alone for stage in stages)


class _Module(tf.Module):
    def __init__(self):
        super().__init__()
        self.factor = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def scale(self, x):
        return {"y": x * self.factor}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def length(self, text):
        return {"length": tf.strings.length(text)}

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def centre(self, x):
        return {"y": x - tf.reduce_mean(x, 0)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def words(self, text):
        return {"words": tf.strings.split(text)}

    @tf.function(input_signature=[tf.RaggedTensorSpec([None, None], tf.float32)])
    def ragged(self, x):
        return {"y": tf.reduce_mean(x, 1)}

    @tf.function(input_signature=[tf.SparseTensorSpec([None, 3], tf.float32)])
    def sparse(self, x):
        return {"y": tf.sparse.to_dense(x)}

    @tf.function(input_signature=[tf.TensorSpec([4, 2], tf.float32, name="x")])
    def four(self, x):
        return {"y": x}


def test_every_signature_of_a_saved_model(tmp_path, caplog):
    module = _Module()
    names = ("length", "centre", "words", "four", "ragged", "sparse")
    signatures = {name: getattr(module, name) for name in names} | {"again": module.scale}
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": module.scale, **signatures})
    served = served_model.load(tmp_path / "m")
    assert list(served.signatures) == ["serving_default", "again", "centre", "length"]
    assert served.of("again") is served
    x = np.array([[1, 2], [3, 6]], "float32")
    assert served.run({"x": x})["y"].tolist() == [[2, 4], [6, 12]]
    assert served.of("centre").run({"x": x})["y"].tolist() == [[-1, -2], [1, 2]]
    texts = np.array([b"abc", b""], object)
    assert served.of("length").run({"text": texts})["length"].tolist() == [3, 0]
    assert {name: bool(one.alone) for name, one in served.signatures.items()} == {
        "serving_default": False,
        "again": False,
        "centre": True,
        "length": False,
    }
    assert "the signature 'words' cannot be served: A model that is served must take and give" in caplog.text
    assert "the signature 'four' cannot be served" in caplog.text
    for name, kind in (("ragged", "RaggedTensor"), ("sparse", "SparseTensor")):
        assert f"The signature {name!r} must take dense tensors" in caplog.text
        assert f"Received: one that takes a {kind}." in caplog.text
    tf.saved_model.save(module, str(tmp_path / "ragged"), {"serving_default": module.words})
    with pytest.raises(ValueError, match=r"dense tensors.*Received: tensor 'words', a RaggedTensor"):
        served_model.load(tmp_path / "ragged")
    tf.saved_model.save(module, str(tmp_path / "sparse"), {"serving_default": module.sparse})
    with pytest.raises(ValueError, match=r"dense tensors.*takes a SparseTensor"):
        SavedModel(tmp_path / "sparse")


class _WithDefaults(tf.Module):
    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2], tf.float32, name="x"),
            tf.TensorSpec([None, 2], tf.float32, name="shift"),
            tf.TensorSpec([], tf.float32, name="temperature"),
        ]
    )
    def __call__(self, x, shift=tf.constant([[1.0, 2.0]]), temperature=tf.constant(2.0)):  # noqa: B008
        return {"y": x / temperature + shift}


def test_inputs_with_defaults(tmp_path):
    module = _WithDefaults()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.__call__)
    served = served_model.load(tmp_path / "m")
    assert [(spec.name, spec.optional) for spec in served.takes] == [("shift", True), ("x", False)]
    x = np.array([[2, 4], [6, 8]], "float32")
    np.testing.assert_array_equal(served.run({"x": x})["y"], [[2, 4], [4, 6]])
    np.testing.assert_array_equal(served.run({"x": x, "shift": x})["y"], [[3, 6], [9, 12]])
    assert served.signature.alone == ""
    model = SavedModel(tmp_path / "m")
    np.testing.assert_array_equal(model(x), [[2, 4], [4, 6]])
    np.testing.assert_array_equal(model({"x": x, "temperature": np.float32(1)}), [[3, 6], [7, 10]])
    with pytest.raises(ValueError, match=r"must be a dict with the inputs .*Received: \['shift'\]"):
        model({"shift": x})
