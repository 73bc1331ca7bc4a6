"""Models loaded for serving: signatures, batches of any size, stages of a pipeline."""

import keras
import numpy as np
import pytest

from hvdext.inference.serving import served_model
from hvdext.inference.serving.service import TensorSpec

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
    assert served._answer.experimental_get_tracing_count() == 1


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
