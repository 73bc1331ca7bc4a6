"""Vocabularies of text and lookup layers in models that are cut up, copied and saved."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.testing import run_ranks

pytestmark = pytest.mark.slow

L = keras.layers
WORDS = np.array([["b", "7"], ["b", "9"], ["a", "7"], ["c", "7"]])
ASKED = tf.constant([["a"], ["b"], ["?"], ["c"]])
NUMBERS = tf.constant([[7], [9], [8], [7]], tf.int64)


def lookups(adapt=True, order=1):
    """A text, and numbers that the last layers look up."""
    text = keras.Input((1,), dtype="string", name="text")
    number = keras.Input((1,), dtype="int64", name="number")
    words = L.StringLookup(name="words")
    numbers = L.IntegerLookup(name="numbers")
    bins = L.Discretization(num_bins=3, name="bins")
    if adapt:
        words.adapt(WORDS[::order, 0])
        numbers.adapt(WORDS[:, 1:].astype("int64"))
        bins.adapt(np.arange(4.0))
    h = L.Embedding(6, 2, name="table", embeddings_initializer=keras.initializers.RandomNormal(seed=1))(
        words(text)
    )
    h = L.Dense(2, name="dense", kernel_initializer=keras.initializers.RandomNormal(seed=2))(
        L.Flatten(name="flat")(h)
    )
    wide = L.Concatenate(name="all")([h, L.Rescaling(1.0, name="found")(numbers(number))])
    edges = L.Rescaling(1.0, name="edges")(bins(L.Rescaling(1.0, -6.5, name="moved")(number)))
    return keras.Model([text, number], L.Concatenate(name="end")([wide, edges]), name="lookups")


PINS = {"words": 0, "dense": 0, "numbers": 1, "bins": 1, "end": 1}


@pytest.mark.parametrize("builds", [True, False])
def test_a_pipeline_and_its_file(builds, tmp_path):
    path = str(tmp_path / "whole.keras")
    expected = lookups()([ASKED, NUMBERS])
    models = [lookups if builds else lookups() for _ in range(2)]

    def program(comm):
        model = hvd.pipeline(models[comm.rank], hvd.plan(models[comm.rank], 2, pins=PINS), 2)
        found = model.predict([ASKED, NUMBERS], batch_size=4, verbose=0)
        model.save(path)
        return found

    for found in run_ranks(2, program):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(keras.models.load_model(path)([ASKED, NUMBERS]), expected, atol=1e-6)


def test_what_a_stage_has_learnt_is_in_the_file(tmp_path):
    """Adapted after the cut, on the rank that has the layer."""
    path = str(tmp_path / "whole.keras")

    def program(comm):
        model = hvd.pipeline(lookups, hvd.plan(lookups, 2, pins=PINS), 2)
        if comm.rank == 1:
            held = {layer.name: layer for layer in model.stages[0].held}
            held["numbers"].adapt(np.array([[9], [9], [8]]))
        model.save(path)

    run_ranks(2, program)
    assert keras.models.load_model(path).get_layer("numbers").get_vocabulary() == [-1, 9, 8]


def test_vocabularies_that_differ():
    def program(comm):
        build = lambda: lookups(adapt=comm.rank == 0)  # noqa: E731
        with pytest.raises(ValueError, match=r"(?s)disagree about .*lookups.*vocabulary of 'words': rank 0"):
            hvd.pipeline(build, hvd.plan(build, 2, pins=PINS), 2)
        return True

    assert run_ranks(2, program) == [True, True]


def test_pipelines_side_by_side_have_those_of_the_first():
    def program(comm):
        grid = hvd.Grid(data=2, pipeline=1)
        with grid.data_parallel():
            build = lambda: lookups(order=1 - 2 * comm.rank)  # noqa: E731
            model = hvd.pipeline(build, hvd.plan(build, 1), 1, grid=grid)
            return model.predict([ASKED, NUMBERS], verbose=0)

    expected = lookups()([ASKED, NUMBERS])
    for found in run_ranks(2, program):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_cut_models_and_their_files(tmp_path):
    """All have the first rank's, and what is loaded has the file's."""
    path = str(tmp_path / "whole.keras")
    given = lookups()
    models = [given, lookups(adapt=False)]
    fresh = [lookups(order=2) for _ in range(2)]  # of two words

    def program(comm):
        cut = hvd.slice_layers(models[comm.rank], {"dense": "column"})
        hvd.save_uncut(cut, path)
        loaded = hvd.slice_layers(fresh[comm.rank], {"dense": "column"})
        loaded.predict([ASKED, NUMBERS], verbose=0)  # traced with its own
        hvd.load_uncut(loaded, path)
        return [model.predict([ASKED, NUMBERS], verbose=0) for model in (cut, loaded)]

    expected = given([ASKED, NUMBERS])
    for found in run_ranks(2, program):
        for one in found:
            np.testing.assert_allclose(one, expected, atol=1e-6)
    np.testing.assert_allclose(keras.models.load_model(path)([ASKED, NUMBERS]), expected, atol=1e-6)


class Inside(L.Layer):
    """A layer with a table that `build` makes, and weights of "tf_idf"."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.counts = L.TextVectorization(output_mode="tf_idf", max_tokens=6, pad_to_max_tokens=True)

    def build(self, shape):
        self.words = L.StringLookup()
        self.built = True

    def call(self, x):
        found = keras.ops.cast(self.words(x), "float32")
        return keras.ops.concatenate([found, self.counts(x)], 1)

    def compute_output_shape(self, shape):
        return shape[0], 7


def test_a_placed_model():
    inside = Inside(name="inside")
    inside.build((None, 1))
    inside.words.adapt(WORDS[:, 0])
    inside.counts.adapt(WORDS[:, 0])
    text = keras.Input((1,), dtype="string", name="text")
    model = keras.Model(text, L.Dense(2, name="dense")(inside(text)), name="text_model")
    placed = hvd.place(model, hvd.plan(model, 2), ["/CPU:0", "/CPU:0"])
    np.testing.assert_allclose(placed(ASKED), model(ASKED), atol=1e-6)
    assert placed.get_layer("inside").words.get_vocabulary() == ["[UNK]", "b", "c", "a"]
