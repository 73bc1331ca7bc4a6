"""What cannot be cut, and what is said about it, on every rank alike."""

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.keras_tools.slice_marks import Slice, cut_axis
from hvdext.testing import run_ranks

L = keras.layers


def _model():
    x = keras.Input((6,), name="x")
    y = L.Dense(8, name="up")(x)
    y = L.LayerNormalization(name="norm")(y)
    return keras.Model(x, L.Dense(7, name="down")(y), name="model")


def _ready(layer):
    layer.build((None, 4))
    return layer


class Subclassed(keras.Model):
    pass


def _on_ranks(size, action):
    """Runs `action(comm)` on threads; all of them must fail with the same message."""
    messages = []

    def run(comm):
        with pytest.raises((ValueError, TypeError, NotImplementedError)) as caught:
            action(comm)
        messages.append(str(caught.value))

    run_ranks(size, run)
    assert len(messages) == size
    assert len(set(messages)) == 1
    return messages[0]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"dwn": "row"},
            "`rules` must match at least one layer each. Received: 'dwn'. Did you mean 'down'?",
        ),
        ({"up": "rows"}, "must cut a Dense by 'column' or 'row' or 'vocabulary'. Received: 'up': 'rows'"),
        ({"norm": "column"}, "must name layers that can be cut: Dense, Embedding, MultiHeadAttention"),
        ({"up": "column", "*p": "row"}, "in one way. Received: 'up': 'column' and '*p': 'row' for 'up'"),
        ({"down": "column"}, "`units` must be a multiple of the number of slices, 2. Received: units=7 in"),
        ({"up": "vocabulary"}, "a layer of the model itself that gives its output only"),
    ],
)
def test_rules(rules, message):
    models = [_model(), _model()]
    assert message in _on_ranks(2, lambda comm: hvd.slice_layers(models[comm.rank], rules))


def test_logits_of_a_model_inside_are_not_left_cut():
    def nested():
        inner = keras.Sequential([keras.Input((6,)), L.Dense(8, name="logits")], name="inner")
        return keras.Sequential([keras.Input((6,)), inner, L.Dense(2, name="last")])

    models = [nested(), nested()]
    message = _on_ranks(2, lambda comm: hvd.slice_layers(models[comm.rank], {"*/logits": "vocabulary"}))
    assert "Received: 'vocabulary' for 'inner/logits'" in message


def test_models():
    compiled, unbuilt = _model(), keras.Sequential([L.Dense(2)])
    compiled.compile("sgd", "mse")
    for model, message in [
        (compiled, "`model` must not be compiled: compile the cut model"),
        (unbuilt, "`model` must be built"),
        (
            Subclassed(),
            "`model` must be a functional or Sequential Keras model, or a function that builds one",
        ),
        ("model", "`model` must be a functional or Sequential Keras model"),
    ]:
        assert message in _on_ranks(2, lambda comm, model=model: hvd.slice_layers(model, {"*": "column"}))
    different = [_model(), keras.Sequential([keras.Input((6,)), L.Dense(8, name="up")])]
    message = _on_ranks(2, lambda comm: hvd.slice_layers(different[comm.rank], {"up": "column"}))
    assert "The ranks disagree about hvd.slice_layers" in message
    numbered = [keras.Sequential([keras.Input((6,)), L.Dense(8, name="up")]) for _ in range(2)]
    message = _on_ranks(2, lambda comm: hvd.slice_layers(numbered[comm.rank], {"up": "column"}))
    assert "paths of what is cut (name the model and its layers): rank 0: ['sequential" in message
    message = _on_ranks(2, lambda comm: hvd.slice_layers(_model(), {"up": ["column", "row"][comm.rank]}))
    assert "rules: rank 0: {'up': 'column'}; rank 1: {'up': 'row'}" in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: hvd.ColumnDense(6),
            "`units` must be a multiple of the number of slices, 4. Received: units=6",
        ),
        (lambda: hvd.RowDense(6, name="r").build((None, 6)), "Received: inputs=6 in layer 'r'"),
        (lambda: hvd.SlicedEmbedding(6, 4), "Received: input_dim=6"),
        (lambda: hvd.SlicedEmbedding(4, 6, cut="columns"), "Received: output_dim=6"),
        (lambda: hvd.SlicedEmbedding(4, 4, cut="heads"), "`cut` must be one of 'rows', 'columns'"),
        (lambda: hvd.SlicedMultiHeadAttention(6, 2), "Received: num_heads=6"),
        (lambda: hvd.SlicedGroupQueryAttention(2, 8, 2), "Received: num_key_value_heads=2"),
        (lambda: hvd.SlicedConv2D(6, 1), "Received: filters=6"),
        (lambda: hvd.SlicedConv2D(6, 1, cut="channels").build((None, 3, 3, 6)), "Received: channels=6"),
        (
            lambda: hvd.SlicedConv2D(8, 1, groups=2),
            "`groups` must be 1 in a SlicedConv2D. Received: groups=2",
        ),
        (lambda: hvd.SlicedConv2D(8, 1, sliced_input=True), "must be False where cut='filters'"),
        (lambda: hvd.ColumnDense(8, "softmax", gather=False), "`activation` must work element by element"),
        (
            lambda: hvd.ColumnDense(8, activity_regularizer="l2", gather=False),
            "`activity_regularizer` must be",
        ),
        (lambda: hvd.ColumnDense(8, lora_rank=2), "`lora_rank` must be None in a cut layer"),
        (lambda: hvd.ColumnDense(8, dtype="float8_from_float32"), "must be None in a cut layer"),
        (
            lambda: hvd.ColumnDense(8, kernel_constraint="max_norm").build((None, 4)),
            "must be NonNeg in a cut",
        ),
        (
            lambda: hvd.ColumnDense(8, kernel_regularizer="orthogonal_regularizer").build((None, 4)),
            "The regularizer of `kernel` must be L1, L2 or L1L2",
        ),
        (lambda: hvd.ColumnDense(8, grid="slices"), "`grid` must be a hvd.Grid or None"),
        (lambda: _ready(hvd.ColumnDense(8)).quantize("int8"), "quantize the uncut model"),
        (lambda: hvd.ColumnDense(8).enable_lora(2), "enable LoRA in the uncut model"),
    ],
)
def test_layers(make, message):
    assert message in _on_ranks(4, lambda comm: make())


def test_an_index_that_no_rank_has_fails_as_in_keras():
    def run(comm):
        table = hvd.SlicedEmbedding(4, 2)
        for wrong in (4, -1):
            with pytest.raises(Exception, match=r"= 2 is not in \[0, 2\)"):
                table(np.array([0, wrong]))

    run_ranks(2, run)


@pytest.mark.slow
def test_alone_everything_is_plain():
    with use(SoloComm()):
        x = np.ones((2, 6), "float32")
        model = _model()
        cut = hvd.slice_layers(model, {"up": "column", "down": "row"}, grid=hvd.Grid())
        np.testing.assert_array_equal(cut.predict(x, verbose=0), model.predict(x, verbose=0))
        cut.compile(keras.optimizers.Lamb(), "mse")  # nothing is cut
        cut.fit(x, np.ones((2, 7)), verbose=0)


def test_slices():
    part = Slice(axis=1, index=2, count=3)
    whole = np.arange(24).reshape(2, 6, 2)
    assert part.shape((2, 6, 2)) == (2, 2, 2)
    np.testing.assert_array_equal(part.of(whole), whole[:, 4:6])
    assert str(part) == "slice 2 of 3 along axis 1"
    assert cut_axis((2, 2, 2), (2, 6, 2)) == 1
    assert cut_axis((2, 2), (2, 2)) is None
    for part_shape, whole_shape in [((2,), (2, 2)), ((1, 1), (2, 2)), ((2, 4), (2, 6))]:
        with pytest.raises(ValueError, match="is no slice of"):
            cut_axis(part_shape, whole_shape)
