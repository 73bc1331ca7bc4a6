"""Which variables are exchanged, and how they are cut into fragments."""

import keras
import numpy as np
import pytest

from hvdext.sync.pieces import Piece
from hvdext.sync.what import All, Matching, Rotating, What

LAYERS = {  # elements of each layer, in the model's order; the second has two of trainable, two of not
    "first": 4 * 3 + 3,
    "norm": 4 * 3,
    "second": 3 * 5 + 5,
    "third": 5 * 2 + 2,
    "last": 2 * 1 + 1,
}
TOTAL = sum(LAYERS.values())
SLOTS = {"first": 2 * 15, "norm": 2 * 6, "second": 2 * 20, "third": 2 * 12, "last": 2 * 3}  # of Adam


@pytest.fixture(scope="module")
def model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, name="drop"),
            layers.Dense(5, name="second"),
            layers.Dense(2, name="third"),
            layers.Dense(1, name="last"),
        ],
        name="m",
    )


def built(optimizer, model):
    optimizer.build(model.trainable_variables)
    return optimizer


@pytest.fixture(scope="module")
def adam(model):
    return built(keras.optimizers.Adam(name="adam"), model)


def labels(fragment):
    return [piece.label for piece in fragment]


def layer_of(label):
    return next(name for name in LAYERS if f"/{name}/" in label or f"_{name}_" in label)


def counts(fragments):
    """How often each element of each variable occurs in `fragments`, by label of the variable."""
    result = {}
    for piece in (piece for fragment in fragments for piece in fragment):
        times = result.setdefault(piece.variable.path, np.zeros(int(np.prod(piece.variable.shape)), int))
        times[slice(piece.start, piece.stop)] += 1
    return result


# -- pieces -------------------------------------------------------------------------------------------


def test_a_whole_piece_and_a_part(model):
    kernel = model.get_layer("first").kernel
    whole, part = Piece(kernel), Piece(kernel, 2, 7, kind="slot")
    assert (whole.size, whole.shape, whole.label, whole.kind) == (12, (4, 3), "m/first/kernel", "trainable")
    assert (part.size, part.shape, part.label, part.kind) == (5, (5,), "m/first/kernel[2:7]", "slot")
    assert (part.part(1, 3).label, part.part(1, 3).kind) == ("m/first/kernel[3:5]", "slot")
    assert part.part(0, 5).label == "m/first/kernel[2:7]"


# -- which variables ----------------------------------------------------------------------------------


def test_all_leaves_counters_and_seeds_out(model):
    kinds = {piece.label: piece.kind for piece in All().fragments(model)[0]}
    assert kinds == {
        **{f"m/{name}/kernel": "trainable" for name in ("first", "second", "third", "last")},
        **{f"m/{name}/bias": "trainable" for name in ("first", "second", "third", "last")},
        **{f"m/norm/{name}": "trainable" for name in ("gamma", "beta")},
        **{f"m/norm/moving_{name}": "non_trainable" for name in ("mean", "variance")},
    }
    assert any("seed" in v.path for v in model.non_trainable_variables)  # there was one to leave out


def test_all_of_one_kind(model, adam):
    (statistics,) = All(trainable=False).fragments(model, adam)
    assert labels(statistics) == ["m/norm/moving_mean", "m/norm/moving_variance"]
    (slots,) = All(trainable=False, non_trainable=False, slots=True).fragments(model, adam)
    assert {piece.kind for piece in slots} == {"slot"}
    assert sorted(labels(slots)) == sorted(
        f"adam/{v.path.replace('/', '_')}_{slot}"
        for v in model.trainable_variables
        for slot in ("momentum", "velocity")
    )


def slots_of(optimizer, model):
    return All(slots=True).fragments(model, optimizer)[0][len(All().fragments(model)[0]) :]


def test_slots_inside_a_loss_scale_optimizer(model):
    inner = keras.optimizers.SGD(momentum=0.9, name="sgd")
    slots = slots_of(built(keras.optimizers.LossScaleOptimizer(inner), model), model)
    assert len(slots) == len(model.trainable_variables)
    assert all(label.startswith("sgd/m_") and label.endswith("_momentum") for label in labels(slots))


def test_slots_of_all_members_of_a_multi_optimizer(model):
    if not hasattr(keras.optimizers, "MultiOptimizer"):
        pytest.skip("This Keras has none.")
    members = keras.optimizers.OptimizerMap(keras.optimizers.SGD(momentum=0.9, name="sgd"))
    members["m/first/.*"] = keras.optimizers.Adam(name="adam")
    found = labels(slots_of(built(keras.optimizers.MultiOptimizer(members), model), model))
    assert sorted(label for label in found if label.startswith("adam")) == [
        f"adam/m_first_{name}"
        for name in ("bias_momentum", "bias_velocity", "kernel_momentum", "kernel_velocity")
    ]
    assert len(found) == 4 + len(model.trainable_variables) - 2


def test_nadams_running_product_belongs_to_no_variable(model):
    assert len(slots_of(built(keras.optimizers.Nadam(), model), model)) == 2 * len(model.trainable_variables)


def test_plain_sgd_has_no_slots(model):
    assert slots_of(built(keras.optimizers.SGD(), model), model) == []


def test_slots_of_no_optimizer(model):
    with pytest.raises(ValueError, match=r"`slots=True` needs an optimizer that is built. Received: no opt"):
        All(slots=True).fragments(model)
    with pytest.raises(ValueError, match="Received: 'sgd_new', which is not built"):
        All(slots=True).fragments(model, keras.optimizers.SGD(name="sgd_new"))


def test_nothing_selected(model):
    with pytest.raises(ValueError, match="must not all be False"):
        All(trainable=False, non_trainable=False)
    plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="d")], name="plain")
    with pytest.raises(ValueError, match=r"must choose at least one .* none of \['plain/d/kernel'"):
        All(trainable=False).fragments(plain)


def test_kinds_are_bools():
    with pytest.raises(ValueError, match=r"`slots` must be True or False. Received: slots=1"):
        All(slots=1)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*/bias"], {"m/first/bias", "m/second/bias", "m/third/bias", "m/last/bias"}),
        (["m/last/*", "*/moving_mean"], {"m/last/kernel", "m/last/bias", "m/norm/moving_mean"}),
        ([["m/last/*", "*/moving_mean"]], {"m/last/kernel", "m/last/bias", "m/norm/moving_mean"}),
        ([lambda v: v.shape == (1,)], {"m/last/bias"}),
    ],
)
def test_matching_and_its_complement(model, patterns, expected):
    everything = set(labels(All().fragments(model)[0]))
    (chosen,) = Matching(*patterns).fragments(model)
    (others,) = (~Matching(*patterns)).fragments(model)
    assert set(labels(chosen)) == expected
    assert set(labels(others)) == everything - expected
    assert len(chosen) + len(others) == len(everything)


def test_matching_looks_among_the_kinds_chosen(model, adam):
    (slots,) = Matching("*_velocity", slots=True).fragments(model, adam)
    assert len(slots) == 10
    (others,) = (~Matching("m/[!l]*", non_trainable=False)).fragments(model)
    assert labels(others) == ["m/last/kernel", "m/last/bias"]
    with pytest.raises(ValueError, match=r"`patterns` must match .* '\*/moving_mean', which matches none of"):
        Matching("*/bias", "*/moving_mean", non_trainable=False).fragments(model)


def test_double_complement():
    matching = Matching("*/bias", slots=True)
    assert ~~matching == matching
    assert ~matching != matching
    assert (~matching).slots
    assert repr(~matching) == "~Matching('*/bias', trainable=True, non_trainable=True, slots=True)"


def test_a_predicate_reads_the_same_on_all_ranks():
    def biases(variable):
        return "bias" in variable.path

    assert "at 0x" not in repr(Matching(biases))
    assert "biases" in repr(Matching(biases))


def test_a_predicate_that_matches_nothing(model):
    def nothing(variable):
        return False

    with pytest.raises(ValueError, match="nothing, which matches none"):
        Matching(nothing).fragments(model)
    with pytest.raises(ValueError, match="nothing, which matches none"):
        (~Matching(nothing)).fragments(model)


def test_a_complement_of_everything(model):
    with pytest.raises(ValueError, match=r"must leave at least one variable .* ~Matching\('m/\*'"):
        (~Matching("m/*")).fragments(model)


@pytest.mark.parametrize("answer", [All(), Rotating(2)])
def test_what_has_no_complement(answer):
    with pytest.raises(ValueError, match=r"`~` needs .* Received: ~(All|Rotating)\("):
        _ = ~answer


@pytest.mark.parametrize("wrong", [3, None, [1], {"a"}])
def test_what_is_no_pattern(wrong):
    with pytest.raises(TypeError, match="`patterns` must be a pattern, a list of patterns or a function"):
        Matching(wrong)


def test_no_patterns_at_all():
    with pytest.raises(ValueError, match="`patterns` must hold at least one pattern"):
        Matching()


# -- fragments ----------------------------------------------------------------------------------------

SELECTIONS = [
    All(),
    All(slots=True),
    Matching("*/kernel"),
    ~Matching("*/first/*", non_trainable=False, slots=True),
    Matching("*_momentum", slots=True, trainable=False),
]


@pytest.mark.parametrize("what", SELECTIONS, ids=repr)
@pytest.mark.parametrize("order", ["strided", "sequential"])
@pytest.mark.parametrize("by", ["layers", "bytes"])
def test_every_element_is_in_exactly_one_fragment(model, adam, by, order, what):
    (selected,) = what.fragments(model, adam)
    expected = counts([selected])
    elements = sum(piece.size for piece in selected)
    numbers = range(1, 4) if by == "layers" else [1, 2, 3, 4, 5, 7, 16, elements - 1, elements]
    for fragments in numbers:
        answer = Rotating(fragments, by=by, order=order, what=what)
        cut = answer.fragments(model, adam)
        assert len(cut) == answer.count == fragments
        assert all(cut)
        found = counts(cut)
        assert found.keys() == expected.keys()
        assert all((times == 1).all() for times in found.values())
        assert sum(piece.size for fragment in cut for piece in fragment) == elements
        if by == "bytes":
            sizes = [sum(piece.size for piece in fragment) for fragment in cut]
            assert max(sizes) - min(sizes) <= 1


def layers_of(fragments):
    return [list(dict.fromkeys(map(layer_of, labels(fragment)))) for fragment in fragments]


@pytest.mark.parametrize(
    ("fragments", "order", "expected"),
    [
        (1, "strided", [["first", "norm", "second", "third", "last"]]),
        (2, "strided", [["first", "second", "last"], ["norm", "third"]]),
        (3, "strided", [["first", "third"], ["norm", "last"], ["second"]]),
        (5, "strided", [["first"], ["norm"], ["second"], ["third"], ["last"]]),
        (2, "sequential", [["first", "norm"], ["second", "third", "last"]]),
        (3, "sequential", [["first"], ["norm", "second"], ["third", "last"]]),
    ],
)
@pytest.mark.parametrize("slots", [False, True])
def test_layers(model, adam, fragments, order, expected, slots):
    cut = Rotating(fragments, order=order, what=All(slots=slots)).fragments(model, adam)
    assert layers_of(cut) == expected
    sizes = [sum(piece.size for piece in fragment) for fragment in cut]
    assert sizes == [sum(LAYERS[n] + slots * SLOTS[n] for n in names) for names in expected]


def test_a_frozen_layer_keeps_its_place(model):
    model.get_layer("second").trainable = False
    try:
        cut = Rotating(5).fragments(model)
    finally:
        model.get_layer("second").trainable = True
    assert layers_of(cut) == [["first"], ["norm"], ["second"], ["third"], ["last"]]


def test_slots_whose_names_do_not_tell_go_with_the_last_layer(model):
    optimizer = built(keras.optimizers.Adafactor(name="ada"), model)
    what = Rotating(4, what=~Matching("m/norm/*", "ada/*norm*", slots=True))
    cut = what.fragments(model, optimizer)
    rows_and_columns = [v for v in optimizer.variables if v.path == "ada/kernel"]
    assert len(rows_and_columns) == 8
    assert {id(p.variable) for p in cut[3]} >= {id(v) for v in rows_and_columns}
    assert labels(cut[0]) == [
        *("m/first/kernel", "m/first/bias"),
        *("ada/m_first_kernel_velocity", "ada/m_first_bias_velocity"),
    ]


def test_nested_names_find_the_longest_owner():
    inputs = keras.Input((2,))
    deep = keras.layers.Dense(2, name="a_kernel")(keras.layers.Dense(2, name="a")(inputs))
    model = keras.Model(inputs, deep)
    optimizer = built(keras.optimizers.SGD(momentum=0.5, name="sgd"), model)
    cut = Rotating(2, what=All(slots=True)).fragments(model, optimizer)
    assert labels(cut[1])[2:] == ["sgd/a_kernel_kernel_momentum", "sgd/a_kernel_bias_momentum"]


def test_bytes_in_one_range_each(model):
    cut = Rotating(3, by="bytes", order="sequential", what=Matching("*/kernel")).fragments(model)
    # 12 + 15 + 10 + 2 = 39 elements: borders at 13 and 26.
    assert [labels(fragment) for fragment in cut] == [
        ["m/first/kernel", "m/second/kernel[0:1]"],
        ["m/second/kernel[1:14]"],
        ["m/second/kernel[14:15]", "m/third/kernel", "m/last/kernel"],
    ]


def test_bytes_dealt_out_in_turn(model):
    # 32 elements in 16 ranges of two, by turns to the two fragments.
    dense = keras.Sequential([keras.Input((16,)), keras.layers.Dense(2, use_bias=False, name="d")], name="s")
    cut = Rotating(2, by="bytes").fragments(dense)
    assert labels(cut[0]) == [f"s/d/kernel[{4 * i}:{4 * i + 2}]" for i in range(8)]
    assert labels(cut[1]) == [f"s/d/kernel[{4 * i + 2}:{4 * i + 4}]" for i in range(8)]
    # One fragment: the neighbours are one range again, and that is the whole.
    ((whole,),) = Rotating(1, by="bytes").fragments(dense)
    assert (whole.start, whole.stop, whole.shape) == (None, None, (16, 2))


def test_too_many_fragments(model):
    with pytest.raises(ValueError, match=r"at most the number of layers selected, 5. Received: fragments=6"):
        Rotating(6).fragments(model)
    assert len(Rotating(TOTAL, by="bytes").fragments(model)) == TOTAL
    message = f"at most the number of elements selected, {TOTAL}. Received: fragments={TOTAL + 1}"
    with pytest.raises(ValueError, match=message):
        Rotating(TOTAL + 1, by="bytes").fragments(model)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2", None])
def test_fragments_is_a_number(wrong):
    with pytest.raises(ValueError, match=f"`fragments` must be an integer of at least 1. .*{wrong!r}"):
        Rotating(wrong)


def test_wrong_words_get_the_nearest():
    with pytest.raises(
        ValueError, match=r"`by` must be one of 'layers', 'bytes'. .*'layer'. Did you mean 'layers'"
    ):
        Rotating(2, by="layer")
    with pytest.raises(ValueError, match=r"Received: order='sequental'. Did you mean 'sequential'\?"):
        Rotating(2, order="sequental")
    with pytest.raises(ValueError, match=r"`order` must be .* Received: order=None.$"):
        Rotating(2, order=None)
    with pytest.raises(
        TypeError, match=r"`hvd.sync.Rotating` has no argument `fragment`. Did you mean `fragments`"
    ):
        Rotating(fragment=2)


@pytest.mark.parametrize("wrong", ["*/kernel", Rotating(2), All])
def test_what_is_cut_must_be_a_selection(wrong):
    with pytest.raises(TypeError, match="`what` must be All"):
        Rotating(2, what=wrong)


def test_counts_are_known_without_a_model():
    assert [answer.count for answer in (All(), Matching("x"), ~Matching("x"), Rotating(7))] == [1, 1, 1, 7]
    assert isinstance(Rotating(7), What)


def test_equal_settings_are_equal():
    assert Rotating(2, what=All(slots=True)) == Rotating(fragments=2, what=All(slots=True))
    assert Rotating(2) != Rotating(2, by="bytes")
    assert len({All(), All(trainable=True), All(slots=True)}) == 2
