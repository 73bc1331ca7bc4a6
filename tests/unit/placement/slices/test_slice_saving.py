"""Whole weights out of cut models and back, at any number of ranks; plain Keras opens the files."""

import json
import zipfile

import keras
import numpy as np
import pytest

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.testing import run_ranks
from tests.multiprocess.programs.slice_programs import whole_over

RULES = {"table": "rows", "attention": "heads", "up": "column", "down": "row", "logits": "vocabulary"}
IDS = np.arange(12).reshape(3, 4) % 8


def _built(seed=0):
    keras.utils.set_random_seed(seed)
    ids = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(8, 8, name="table")(ids)
    x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(4, 2, name="attention")(x, x)])
    y = keras.layers.Dense(16, "gelu", name="up")(keras.layers.LayerNormalization()(x))
    y = keras.layers.Dense(8, name="down")(y)
    return keras.Model(ids, keras.layers.Dense(8, name="logits")(y), name="words")


def _compiled(model):
    model.compile(
        keras.optimizers.AdamW(0.01, use_ema=True),
        hvd.SlicedSparseCategoricalCrossentropy(),
        metrics=[hvd.SlicedSparseCategoricalAccuracy()],
        run_eagerly=True,
    )
    return model


def _trained_plain(steps, model=None):
    if model is None:
        model = _built()
        model.compile(
            keras.optimizers.AdamW(0.01, use_ema=True),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
            run_eagerly=True,
        )
    for _ in range(steps):
        model.train_on_batch(IDS, (IDS + 1) % 8)
    return model


def _trained(path, models, rules, load=None):
    """One step of cut models, from the state in the file `load` on; saves the whole to `path`."""

    def run(comm):
        cut = _compiled(hvd.slice_layers(models[comm.rank], rules))
        if load is not None:
            hvd.load_uncut(cut, load)
        cut.train_on_batch(IDS, (IDS + 1) % 8)
        hvd.save_uncut(cut, path)
        return path.exists()

    assert run_ranks(len(models), run) == [True] * len(models)


def _assert_same(model, expected, tolerance=2e-5):
    for mine, theirs in zip(
        [*model.weights, *model.optimizer.variables],
        [*expected.weights, *expected.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), atol=tolerance, err_msg=mine.path)


@pytest.mark.slow
def test_saved_at_two_ranks_continued_at_four_and_in_one_process(tmp_path):
    first, second = tmp_path / "two.keras", tmp_path / "four.keras"
    _trained(first, [_built() for _ in range(2)], RULES)
    names = json.dumps(json.loads(zipfile.ZipFile(first).read("config.json")))
    assert "hvdext" not in names
    assert "Sliced" not in names
    plain = keras.models.load_model(first)
    assert type(plain.get_layer("up")) is keras.layers.Dense
    assert type(plain.loss) is keras.losses.SparseCategoricalCrossentropy
    _assert_same(plain, _trained_plain(1))

    _trained(second, [_built(seed=9) for _ in range(4)], RULES, load=first)
    expected = _trained_plain(2)
    _assert_same(keras.models.load_model(second), expected)
    _assert_same(_trained_plain(1, plain), expected)

    with use(SoloComm()):
        alone = _compiled(hvd.slice_layers(_built(seed=9), RULES))
        hvd.load_uncut(alone, second)
        _assert_same(alone, expected)


def _my_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


class _MyOptimizer(keras.optimizers.SGD):
    """A user's, not registered."""


@pytest.mark.slow
def test_what_keras_cannot_find_by_name(tmp_path):
    path = tmp_path / "small.keras"
    x = np.ones((2, 4))

    def small():
        model = [keras.Input((4,)), keras.layers.Dense(2, name="up"), keras.layers.Dense(3, name="down")]
        return keras.Sequential(model, name="small")

    def compiled(model):
        model.compile(_MyOptimizer(0.1, momentum=0.9), _my_loss, metrics=[_my_loss], run_eagerly=True)
        return model

    models = [small() for _ in range(4)]
    compiled(models[3]).train_on_batch(x, np.ones((2, 3)))

    def run(comm):
        cut, again = (
            compiled(hvd.slice_layers(model, {"up": "column", "down": "row"}))
            for model in (models[0], models[1 + comm.rank])
        )
        cut.train_on_batch(x, np.ones((2, 3)))
        hvd.save_uncut(cut, path)
        hvd.load_uncut(again, path)
        return [[v.numpy() for v in [*model.weights, *model.optimizer.variables]] for model in (cut, again)]

    for saved, loaded in run_ranks(2, run):
        assert all(map(np.array_equal, saved, loaded))
    configs = [json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"]]
    models[3].save(path)
    configs.append(json.loads(zipfile.ZipFile(path).read("config.json"))["compile_config"])
    assert configs[0] == configs[1]


@pytest.mark.slow
def test_weights_only(tmp_path):
    path = tmp_path / "words.weights.h5"
    expected = _built(seed=3)
    models = [_built(seed=3), _built(seed=4)]

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], RULES)
        hvd.save_uncut(cut, path)
        cut.set_weights([w * 0 for w in cut.get_weights()])
        hvd.load_uncut(cut, path)
        return whole_over(comm)(cut.weights, [v.numpy() for v in cut.weights])

    for found in run_ranks(2, run):
        for mine, theirs in zip(found, expected.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    plain = _built()
    plain.load_weights(path)
    np.testing.assert_array_equal(plain.predict(IDS, verbose=0), expected.predict(IDS, verbose=0))


@pytest.mark.slow
def test_one_group_of_a_grid_writes(tmp_path):
    path = tmp_path / "words.keras"
    models = [_built() for _ in range(4)]

    def run(comm):
        with hvd.Grid(data=2, slices=2).data_parallel():
            hvd.save_uncut(hvd.slice_layers(models[comm.rank], RULES), path)
            return path.exists()

    assert all(run_ranks(4, run))
    for mine, theirs in zip(keras.models.load_model(path).weights, models[0].weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_what_cannot_be_saved_or_loaded(tmp_path):
    other = tmp_path / "other.keras"
    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="logits")])
    small.save(other)
    models = [_built(), _built()]

    def run(comm):
        cut = hvd.slice_layers(models[comm.rank], RULES)
        with pytest.raises(ValueError, match=r"`filepath` must end with .keras or .weights.h5. Received"):
            hvd.save_uncut(cut, "model.h5")
        with pytest.raises(ValueError, match=r"`filepath` must hold the uncut model. .*other.keras"):
            hvd.load_uncut(cut, other)
        missing = tmp_path / f"missing{comm.rank}.keras" if comm.rank else other
        with pytest.raises(
            ValueError, match=r"disagree about hvd.load_uncut:(.|\n)*must be a file that Keras"
        ):
            hvd.load_uncut(cut, missing)
        with pytest.raises(FileNotFoundError, match=r"save_uncut could not write .*missing"):
            hvd.save_uncut(cut, tmp_path / "missing" / "model.keras")

    run_ranks(2, run)
