"""`hvd.predict` gives what `model.predict` gives, bit by bit, for every kind of input and number of ranks."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.inference.predict.sources.sources import make_source
from hvdext.testing import run_ranks
from tests.unit.inference.predict.predict_kinds import (
    BATCH,
    KINDS,
    ROWS,
    Indexed,
    dataset,
    numbers,
    of_unknown_length,
    seeded,
    small,
)

SIZES = (1, 2, 4)


def same(found, expected):
    """The same structure, types, shapes and bits."""
    keras.tree.assert_same_structure(found, expected)
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        assert one.dtype == other.dtype
        if isinstance(other, tf.RaggedTensor):
            assert one.to_list() == other.to_list()
        else:
            np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def models():
    """One model for each kind, which threads share: most of the time goes into building them."""
    return {name: kind.model() for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def expected(models, tmp_path_factory):
    """Kind -> what plain Keras predicts."""
    folder = tmp_path_factory.mktemp("plain")
    found = {}
    for name, kind in KINDS.items():
        x = kind.plain() if kind.plain else kind.x(folder)
        found[name] = models[name].predict(x, kind.batch_size, verbose=0)
    return found


@pytest.fixture(scope="module", params=SIZES)
def predictions(request, models, tmp_path_factory):
    """Kind -> what each rank gets with gather="all" and "rank0"; all kinds in one job."""
    folder = tmp_path_factory.mktemp("ranks")
    inputs = {name: folder / name for name in KINDS}
    for name, kind in KINDS.items():
        if kind.plain is not None:
            kind.x(inputs[name])

    def program(comm):
        found = {}
        for name, kind in KINDS.items():
            model = models[name]
            x = inputs[name] if kind.plain is not None else kind.x(inputs[name])
            options = kind.options() | {"batch_size": kind.batch_size, "verbose": 0}
            everyone = hvd.predict(model, x, gather="all", **options)
            found[name] = everyone, hvd.predict(model, x, **options)
        return found

    return run_ranks(request.param, program)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_equal_to_plain_keras(name, predictions, expected):
    for rank, found in enumerate(predictions):
        everyone, first = found[name]
        same(everyone, expected[name])
        if rank == 0:
            same(first, expected[name])
        else:
            assert first is None


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.slow
def test_numbers_of_rows(ranks):
    """From none to more than a few rounds."""
    data = {rows: numbers(rows, dtype="float32") for rows in (0, 1, 3, 1000, 60_000)}

    def program(comm):
        model = small()
        return {
            rows: hvd.predict(model, x, max(rows // 150, 32), gather="all", verbose=0)
            for rows, x in data.items()
        }

    model = small()
    plain = {rows: model.predict(x, max(rows // 150, 32), verbose=0) for rows, x in data.items() if rows}
    plain[0] = np.zeros((0, 3), "float32")
    for found in run_ranks(ranks, program):
        for rows, predicted in found.items():
            same(predicted, plain[rows])


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rows_of_other_inputs(ranks, tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((0, 6)))

    def program(comm):
        empty = tf.data.Dataset.from_tensor_slices(numbers(dtype="float32")).batch(BATCH).take(0)
        inputs = {
            "arrays": {"one": numbers(0), "two": numbers(0, 2)},
            "data set": empty,
            "data set of unknown length": empty.filter(lambda x: True),
            "folder": tmp_path,
        }
        models = {
            name: KINDS["dict in, nested out"].model() if name == "arrays" else small() for name in inputs
        }
        return {name: hvd.predict(models[name], x, gather="all", verbose=0) for name, x in inputs.items()}

    for found in run_ranks(ranks, program):
        nested = found.pop("arrays")
        assert [p.shape for p in keras.tree.flatten(nested)] == [(0, 5), (0, 1), (0, 2)]
        for predicted in found.values():
            same(predicted, np.zeros((0, 3), "float32"))


def test_each_rank_computes_its_own_batches():
    """Of many batches every rank has a quarter, but for one; nobody has another's."""

    def program(comm):
        data = Indexed(numbers(61 * BATCH, dtype="float32"))
        hvd.predict(small(), data, verbose=0)
        return sorted(data.asked[1:])  # the first of all is compared between the ranks before

    asked = run_ranks(4, program)
    assert sorted(number for mine in asked for number in mine) == list(range(61))
    assert all(len(mine) in (14, 15, 16) for mine in asked), asked


def test_an_unbuilt_model_is_built_first():
    def program(comm):
        keras.utils.set_random_seed(5)
        model = keras.Sequential([keras.layers.Dense(3, kernel_initializer="ones")])
        return hvd.predict(model, numbers(), gather="all", verbose=0)

    for found in run_ranks(2, program):
        np.testing.assert_allclose(
            found, np.repeat(numbers().sum(1, keepdims=True), 3, 1), rtol=1e-5, atol=1e-5
        )


# -- errors --------------------------------------------------------------------------------------------


def refused(ranks, call):
    """The message of the error that every rank raises."""

    def program(comm):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call(comm)
        return f"{caught.type.__name__}: {caught.value}"

    messages = set(run_ranks(ranks, program))
    assert len(messages) == 1, messages
    return messages.pop()


def same_first(rows):
    """Batches in the order of `rows`, but for the first one."""
    return dataset(np.zeros((BATCH, 6))).concatenate(dataset(rows))


def endless(comm):
    return hvd.predict(small(), dataset(numbers()).repeat())


BAD_CALLS = {
    "batch_size": (
        lambda c: hvd.predict(small(), numbers(), 0),
        "`batch_size` must be an integer of at least 1",
    ),
    "gather": (
        lambda c: hvd.predict(small(), numbers(), gather="everyone"),
        "`gather` must be one of 'rank0', 'all'",
    ),
    "verbose": (lambda c: hvd.predict(small(), numbers(), verbose=7), "`verbose` must be one of"),
    "resume": (lambda c: hvd.predict(small(), numbers(), resume=True), "`resume` must come with `output`"),
    "model": (lambda c: hvd.predict(small, numbers()), "`model` must be a keras.Model. Received: a function"),
    "kind": (lambda c: hvd.predict(small(), [1.0, 2.0]), "`x` must be arrays with rows"),
    "scalar": (lambda c: hvd.predict(small(), np.float64(3)), "rows along a first axis"),
    "lengths": (
        lambda c: hvd.predict(KINDS["dict in, nested out"].model(), {"one": numbers(), "two": numbers(5, 2)}),
        "must have equally many rows. Received: [5, 53]",
    ),
    "own batches": (lambda c: hvd.predict(small(), dataset(numbers()), 8), "`batch_size` must be None"),
    "unbatched": (
        lambda c: hvd.predict(small(), tf.data.Dataset.range(3)),
        "must be a tf.data.Dataset of batches",
    ),
    "endless": (endless, "`x` must come to an end"),
    "no folder": (lambda c: hvd.predict(small(), "no/such/folder"), "must be a folder that exists"),
    "parse": (
        lambda c: hvd.predict(small(), numbers(), parse=len),
        "`parse` must be a function, and goes with",
    ),
    "weights": (
        lambda c: hvd.predict(_of_rank(c), numbers()),
        "The ranks disagree about hvd.predict:\n  weights",
    ),
    "architecture": (
        lambda c: hvd.predict(_with_activation(["tanh", "relu"][c.rank]), numbers()),
        "The ranks disagree about hvd.predict:\n  architecture",
    ),
    "rows": (lambda c: hvd.predict(small(), numbers(50 + c.rank)), "  rows: rank 0: 50; rank 1: 51"),
    "content": (lambda c: hvd.predict(small(), numbers() + c.rank), "  SHA-256 of 16 rows: rank 0"),
    "order": (
        lambda c: hvd.predict(small(), dataset(numbers()).shuffle(50, seed=c.rank + 2)),
        "SHA-256 of the first batch",
    ),
    "order, later": (
        lambda c: hvd.predict(small(), same_first(numbers()[:: 1 - 2 * c.rank])),
        "`x` must give the same batches on all ranks, in the same order",
    ),
    "one rank's argument": (
        lambda c: hvd.predict(small(), numbers(), 0 if c.rank else 8),
        "error: rank 0: (missing); rank 1: ",
    ),
    "longer on one": (
        lambda c: hvd.predict(small(), of_unknown_length(numbers(37 + 12 * c.rank, dtype="float32"))),
        "the data has other batches here than",
    ),
}


def _of_rank(comm):
    model = small()
    model.set_weights([w + comm.rank for w in model.get_weights()])
    return model


def _with_activation(activation, name=None):
    layer = keras.layers.Dense(3, activation=activation, name=name, kernel_initializer="zeros")
    return seeded(keras.Sequential([keras.Input((6,)), layer], name=name))


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refused_on_every_rank_alike(name):
    call, text = BAD_CALLS[name]
    assert text in refused(2, call)


def test_folders_that_cannot_be_read(tmp_path):
    empty, mixed, packed = tmp_path / "empty", tmp_path / "mixed", tmp_path / "records"
    for folder in (empty, mixed, packed):
        folder.mkdir()
    np.save(mixed / "a.npy", numbers(3))
    np.save(mixed / "b.npy", numbers(3, 5))
    (packed / "a.tfrecord").write_bytes(b"")
    assert "without any" in refused(2, lambda c: hvd.predict(small(), empty))
    assert "a.npy of float64 (6,) and b.npy of float64 (5,)" in refused(
        2, lambda c: hvd.predict(small(), mixed)
    )
    assert "`parse` must be given" in refused(2, lambda c: hvd.predict(small(), packed))
    assert "with none" in refused(2, lambda c: hvd.predict(small(), empty, parse=lambda r: r))
    (mixed / "b.npy").write_bytes(b"no array")
    assert "b.npy: " in refused(2, lambda c: hvd.predict(small(), mixed))


@pytest.mark.parametrize("ranks", SIZES)
def test_a_batch_that_fails_on_one_rank(ranks):
    """The rank that has it says so, and all raise the same."""

    class Failing(Indexed):
        def __getitem__(self, index):
            if index == 9:
                raise ZeroDivisionError("bad rows")
            return super().__getitem__(index)

    message = refused(ranks, lambda c: hvd.predict(small(), Failing(numbers(dtype="float32")), verbose=0))
    assert "batch 9: ZeroDivisionError: bad rows" in message
    assert "rows" in message.lower()


def test_a_lost_rank_is_reported():
    """The others say which rows were done."""

    class Leaving(Indexed):
        def __init__(self, comm):
            super().__init__(numbers(ROWS * BATCH, dtype="float32"))
            self.comm = comm

        def __getitem__(self, index):
            if index > 30 and self.comm.rank == 1:
                raise SystemExit("gone")
            return super().__getitem__(index)

    messages = []

    def program(comm):
        try:
            hvd.predict(small(), Leaving(comm), verbose=0)
        except RuntimeError as error:
            messages.append(str(error))
            raise

    with pytest.raises(SystemExit):
        run_ranks(2, program)
    (message,) = messages
    assert "hvd.predict has lost a rank. Rows 0 to " in message
    assert "`output=` would have kept them" in message


@pytest.mark.parametrize("run", [(0, 3), (9, 13), (12, 14), (18, 20)])
def test_the_end_of_a_data_set(run):
    """However far a rank has gone."""
    for count, ends in ((10, False), (13, True), (14, False), (21, False)):
        source = make_source(of_unknown_length(numbers(49)))  # 13 batches
        assert len(list(source.read(*run))) == max(0, min(13, run[1]) - run[0])
        assert source.ends_at(count) == ends


def test_wrong_keyword():
    with pytest.raises(TypeError, match="Did you mean `batch_size`"):
        hvd.predict(small(), numbers(), batchsize=3)


def test_a_cut_model_is_refused():
    def program(comm):
        inputs = keras.Input((6,))
        model = keras.Model(inputs, hvd.ColumnDense(4)(inputs))
        hvd.predict(model, numbers())

    assert "`model` must be whole on every rank" in refused(2, program)


def test_random_layers_may_differ():
    """States of random generators are no reason to refuse a model."""

    def program(comm):
        model = seeded(keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]))
        dropout = keras.Sequential([model, keras.layers.Dropout(0.5, seed=comm.rank)])
        return hvd.predict(dropout, numbers(), gather="all", verbose=0)

    first, second = run_ranks(2, program)
    np.testing.assert_array_equal(first, second)


def test_names_may_differ():
    """Keras counts the layers that a process has made: a rank may have made others before."""

    def program(comm):
        return hvd.predict(_with_activation("tanh", f"of_{comm.rank}"), numbers(), gather="all", verbose=0)

    first, second = run_ranks(2, program)
    np.testing.assert_array_equal(first, second)


def test_one_batch_may_be_written_to():
    (predicted,) = run_ranks(1, lambda comm: hvd.predict(small(), numbers(3), verbose=0))
    predicted[0] = 0
    same(predicted[1:], small().predict(numbers(3), verbose=0)[1:])
