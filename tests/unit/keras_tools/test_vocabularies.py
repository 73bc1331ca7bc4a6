"""Vocabularies, bins and other assets go from one layer to another like it, whatever made them."""

import pickle

import keras
import numpy as np
import pytest

from hvdext.keras_tools.vocabularies import (
    Vocabulary,
    lookup_layers,
    set_vocabulary_of,
    take_along,
    vocabulary_of,
)

L = keras.layers
WORDS = np.array([["the cat"], ["the dog sat"], ["a cat"], ["\xe9t\xe9 the"]])


def vectorization(**options):
    return L.TextVectorization(**({"output_sequence_length": 4} | options))


# Name -> (layer that is adapted, what it is adapted to, what it is asked).
ADAPTED = {
    "text": (vectorization, WORDS, WORDS),
    "tf-idf": (lambda: vectorization(output_mode="tf_idf", output_sequence_length=None), WORDS, WORDS),
    "padded tf-idf": (
        lambda: L.StringLookup(max_tokens=9, output_mode="tf_idf", pad_to_max_tokens=True),
        WORDS,
        WORDS[1:],
    ),
    "strings": (lambda: L.StringLookup(num_oov_indices=2, mask_token=""), WORDS, [["a cat"], [""], ["?"]]),
    "inverted": (lambda: L.StringLookup(invert=True), WORDS, [[1], [3], [9]]),
    "integers": (lambda: L.IntegerLookup(mask_token=0), [[7], [7], [5], [0]], [[5], [7], [0], [1]]),
    "bins": (lambda: L.Discretization(num_bins=3), np.arange(9.0), [[0.5], [4.0], [8.5]]),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_a_layer_of_the_same_settings_does_the_same(kind):
    make, data, asked = ADAPTED[kind]
    learnt, fresh = make(), make()
    learnt.adapt(data)
    content = vocabulary_of(learnt)
    assert content != vocabulary_of(fresh)
    assert set_vocabulary_of(fresh, pickle.loads(pickle.dumps(content)))
    assert vocabulary_of(fresh) == content
    assert not set_vocabulary_of(fresh, content)
    asked = np.array(asked)
    np.testing.assert_array_equal(np.array(fresh(asked)), np.array(learnt(asked)))


def test_what_was_not_adapted_holds_nothing():
    for make, _, _ in ADAPTED.values():
        assert vocabulary_of(make()) is None


def test_weights_of_what_is_no_token_are_kept():
    given = {"vocabulary": ["[UNK]", "a", "b"], "output_mode": "tf_idf", "idf_weights": [9.0, 1.0, 2.0]}
    one = L.StringLookup(**given)
    other = L.StringLookup(**(given | {"idf_weights": [0.0, 5.0, 5.0]}))
    assert vocabulary_of(one) == Vocabulary((b"a", b"b"), (9.0, 1.0, 2.0))
    set_vocabulary_of(other, vocabulary_of(one))
    np.testing.assert_array_equal(other(np.array([["?", "b"]])), [[9.0, 0.0, 2.0]])


def test_a_vocabulary_that_replaces_a_given_one_is_saved(tmp_path):
    lookup = L.StringLookup(vocabulary=["a", "b"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup])
    set_vocabulary_of(lookup, Vocabulary((b"b", b"c", b"d")))
    model.save(tmp_path / "lookup.keras")
    opened = keras.models.load_model(tmp_path / "lookup.keras")
    np.testing.assert_array_equal(opened(np.array([["d"], ["a"]])), [[3], [0]])


def test_a_vocabulary_from_a_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("x\ny\n")
    assert vocabulary_of(L.StringLookup(vocabulary=str(path))) == Vocabulary((b"x", b"y"))


class Pair(L.Layer):
    """Layers in attributes and lists."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = vectorization(name="words")
        self.more = [L.Discretization(num_bins=2, name="bins")]


def test_layers_at_any_depth():
    inner = keras.Sequential([keras.Input((1,), dtype="string"), L.StringLookup(name="inside")])
    model = keras.Model()
    model.inner, model.pair = inner, Pair()
    assert [layer.name for layer in lookup_layers(model)] == ["inside", "bins", "words"]
    source, target = Pair(), Pair()
    source.words.adapt(WORDS)
    assert take_along(source, target)
    assert not take_along(source, target)
    assert target.words.get_vocabulary() == source.words.get_vocabulary()
    with pytest.raises(ValueError, match="Received: a copy with StringLookup 'inside'"):
        take_along(source, inner)


class Files(L.Layer):
    """Keeps words of its own in a file, as tokenizers do."""

    words = ""

    def save_assets(self, folder):
        if self.words:
            with open(f"{folder}/words.txt", "w") as file:
                file.write(self.words)

    def load_assets(self, folder):
        with open(f"{folder}/words.txt") as file:
            self.words = file.read()


def test_other_assets():
    one, other = Files(), Files()
    assert vocabulary_of(one) is None
    one.words = "a b"
    assert set_vocabulary_of(other, vocabulary_of(one))
    assert other.words == "a b"


def test_what_cannot_be_replaced():
    wide = L.StringLookup(vocabulary=["a", "b"], output_mode="multi_hot", name="wide")
    with pytest.raises(ValueError, match=r"StringLookup 'wide' cannot be replaced: .*size cannot be changed"):
        set_vocabulary_of(wide, Vocabulary((b"a", b"b", b"c")))
    with pytest.raises(ValueError, match="never adapted"):
        set_vocabulary_of(wide, None)
