"""Predictions streamed to files: right at every moment, and taken up again after an interruption."""

import json
import threading

import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.inference.predict.output.npy_file import NpyFile
from hvdext.inference.predict.output.output_folder import file_names
from hvdext.inference.predict.progress import Progress, duration
from hvdext.inference.predict.rounds import Pace, Run, evenly, next_runs
from hvdext.testing import run_ranks
from tests.unit.inference.predict.predict_kinds import (
    BATCH,
    Indexed,
    both,
    dataset,
    in_bfloat16,
    numbers,
    of_unknown_length,
    small,
    two_inputs,
)

ROWS = 61 * BATCH - 1


class Failing(Indexed):
    """Cannot give batch 40 before it is mended."""

    broken = True

    def __getitem__(self, index):
        if index == 40 and self.broken:
            raise ZeroDivisionError("bad rows")
        return super().__getitem__(index)


def predicted(ranks, folder, make_x, model=small, **options):
    def program(comm):
        return hvd.predict(model(), make_x(), output=folder, verbose=0, **options)

    return run_ranks(ranks, program)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_files_hold_what_plain_keras_predicts(ranks, tmp_path):
    first, *others = predicted(ranks, tmp_path / "deep" / "out", lambda: numbers(ROWS), batch_size=BATCH)
    assert others == [None] * (ranks - 1)
    assert isinstance(first, np.memmap)
    expected = small().predict(numbers(ROWS), BATCH, verbose=0)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(np.load(tmp_path / "deep" / "out" / "predictions.npy"), expected)
    progress = json.loads((tmp_path / "deep" / "out" / "progress.json").read_text())
    assert (progress["rows"], progress["batches"], progress["finished"]) == (ROWS, 61, True)
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == [
        "predictions.npy",
        "progress.json",
    ]


def test_outputs_by_name(tmp_path):
    found = predicted(2, tmp_path, both, two_inputs)[0]
    expected = two_inputs().predict(both(), verbose=0)
    np.testing.assert_array_equal(found["sum"], expected["sum"])
    np.testing.assert_array_equal(np.load(tmp_path / "parts.1.npy"), expected["parts"][1])
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["parts.0.npy", "parts.1.npy", "sum.npy"]


def test_bfloat16_is_written_as_float32(tmp_path):
    found = predicted(2, tmp_path, numbers, in_bfloat16)[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, in_bfloat16().predict(numbers(), verbose=0).astype("float32"))


def test_no_rows(tmp_path):
    found = predicted(2, tmp_path, lambda: numbers(0))[0]
    assert (found.shape, found.dtype) == ((0, 3), np.float32)


SOURCES = {
    "arrays": (lambda: numbers(ROWS, dtype="float32"), {"batch_size": BATCH}),
    "data set": (lambda: dataset(numbers(ROWS, dtype="float32")), {}),
    "data set of unknown length": (lambda: of_unknown_length(numbers(ROWS, dtype="float32")), {}),
}


@pytest.mark.parametrize("before", [1, 2])
def test_resume(before, tmp_path):
    """After a failure, on another number of ranks; what is done is not done again."""
    data = Failing(numbers(ROWS, dtype="float32"))
    messages = set()

    def interrupted(comm):
        with pytest.raises(RuntimeError) as caught:
            hvd.predict(small(), data, output=tmp_path, verbose=0)
        messages.add(str(caught.value))

    run_ranks(before, interrupted)
    (message,) = messages  # the same on every rank
    assert "batch 40: ZeroDivisionError: bad rows" in message
    done = json.loads((tmp_path / "progress.json").read_text())
    assert 0 < done["batches"] <= 40
    assert done["rows"] == BATCH * done["batches"]
    assert f"Rows 0 to {done['rows'] - 1} are done and kept in" in message
    assert f"goes on from row {done['rows']}" in message
    expected = small().predict(data.x, BATCH, verbose=0)
    half = np.load(tmp_path / "predictions.npy")
    np.testing.assert_array_equal(half, expected[: done["rows"]])

    data.broken, data.asked = False, []
    found = predicted(3, tmp_path, lambda: data, resume=True)[0]
    np.testing.assert_array_equal(found, expected)
    assert sorted(set(data.asked)) == [0, *range(done["batches"], 61)]  # 0: to tell the data by
    data.asked = []
    np.testing.assert_array_equal(predicted(2, tmp_path, lambda: data, resume=True)[0], expected)
    assert set(data.asked) == {0}  # it is finished


@pytest.mark.parametrize("name", SOURCES)
def test_resume_in_the_middle(name, tmp_path):
    """As a run that was killed leaves it: rows behind those that count."""
    make_x, options = SOURCES[name]
    expected = predicted(1, tmp_path, make_x, **options)[0].copy()
    path = tmp_path / "progress.json"
    progress = json.loads(path.read_text()) | {"batches": 20, "rows": 20 * BATCH, "finished": False}
    path.write_text(json.dumps(progress))
    spoilt = np.load(tmp_path / "predictions.npy", mmap_mode="r+")
    spoilt[20 * BATCH :] = -1
    spoilt.flush()
    found = predicted(2, tmp_path, make_x, resume=True, **options)[0]
    np.testing.assert_array_equal(found, expected)


def test_resume_begins_where_nothing_is(tmp_path):
    found = predicted(2, tmp_path / "new", lambda: numbers(), resume=True)[0]
    np.testing.assert_array_equal(found, small().predict(numbers(), verbose=0))


def test_a_run_that_was_killed_before_its_first_row(tmp_path):
    data = Failing(numbers(ROWS, dtype="float32"))
    with pytest.raises(RuntimeError):
        predicted(1, tmp_path, lambda: data)
    progress = json.loads((tmp_path / "progress.json").read_text())
    (tmp_path / "progress.json").write_text(json.dumps(progress | {"batches": 0, "rows": 0, "outputs": []}))
    data.broken = False
    found = predicted(1, tmp_path, lambda: data, resume=True)[0]
    np.testing.assert_array_equal(found, small().predict(data.x, BATCH, verbose=0))


def other_weights():
    model = small()
    model.set_weights([w + 1 for w in model.get_weights()])
    return model


def with_relu():
    model = small()
    model.layers[0].activation = tf.nn.relu
    return model


def text_out():
    import keras

    inputs = keras.Input((6,))
    return keras.Model(
        inputs, keras.layers.Lambda(lambda x: tf.strings.as_string(x), output_shape=(6,))(inputs)
    )


REFUSED = {
    "without resume": ({}, {}, "`output` must be a folder without predictions, or resume=True"),
    "other batches": ({"batch_size": 8, "resume": True}, {}, "batch_size: then 4, now 8"),
    "other weights": ({"resume": True}, {"model": other_weights}, "weights (SHA-256): then "),
    "another activation": ({"resume": True}, {"model": with_relu}, "architecture (SHA-256): then "),
    "other data": ({"resume": True}, {"make_x": lambda: numbers() + 1}, "SHA-256 of 16 rows: then "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_not_taken_up(name, tmp_path):
    options, others, text = REFUSED[name]
    predicted(1, tmp_path, numbers, batch_size=BATCH)
    with pytest.raises(ValueError) as caught:
        predicted(
            2, tmp_path, **({"make_x": numbers, "model": small, "batch_size": BATCH} | others | options)
        )
    assert text in str(caught.value)
    np.testing.assert_array_equal(
        np.load(tmp_path / "predictions.npy"), small().predict(numbers(), BATCH, verbose=0)
    )


@pytest.mark.parametrize("factor", ["in the graph", "in a variable"])
def test_another_saved_model_is_not_taken_up(factor, tmp_path):
    """Which holds its weights apart from Keras, and may have none."""
    for name, value in (("one", 1.0), ("two", 2.0)):
        module = tf.Module()
        module.factor = tf.Variable(value) if factor == "in a variable" else tf.constant(value)
        signature = tf.function(
            lambda x, module=module: {"y": x * module.factor}, input_signature=[tf.TensorSpec([None, 6])]
        )
        tf.saved_model.save(module, tmp_path / name, signatures=signature)
    x, output = numbers(dtype="float32"), tmp_path / "out"

    def predicted_by(name, **options):
        return run_ranks(
            2, lambda comm: hvd.predict(hvd.deploy(tmp_path / name), x, output=output, verbose=0, **options)
        )[0]

    predicted_by("one")
    np.testing.assert_array_equal(predicted_by("one", resume=True), x)
    changed = {"in the graph": "architecture", "in a variable": "weights"}[factor]
    with pytest.raises(ValueError, match=changed):
        predicted_by("two", resume=True)


def test_refused_outputs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`output` must be a folder"):
        predicted(2, tmp_path / "file", numbers)
    with pytest.raises(ValueError, match="`gather` must be 'rank0' with `output`"):
        predicted(2, tmp_path / "all", numbers, gather="all")
    with pytest.raises(ValueError, match=r"dense arrays of numbers\. Received: text"):
        predicted(2, tmp_path / "text", numbers, text_out)
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "mine.npy", np.zeros(3))
    with pytest.raises(ValueError, match="holds 'mine"):
        predicted(2, other, numbers)
    (other / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a progress.json that can be read. Received: KeyError"):
        predicted(2, other, numbers, resume=True)


def test_a_disk_that_is_full_is_told_to_all(tmp_path, monkeypatch):
    """Only rank 0 writes; the others must not wait for it."""

    def full(self, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(NpyFile, "append", full)
    messages = []

    def program(comm):
        with pytest.raises(OSError) as caught:
            hvd.predict(small(), numbers(), BATCH, output=tmp_path, verbose=0)
        messages.append(str(caught.value))

    run_ranks(2, program)
    assert len(set(messages)) == 1
    assert "rank 0: keeping the predictions: OSError: [Errno 28] No space left on device" in messages[0]


def test_threads_end(tmp_path):
    before = threading.active_count()
    predicted(2, tmp_path, numbers)
    for thread in threading.enumerate():
        if thread.name.startswith("hvdext-"):
            thread.join(5)
    assert threading.active_count() <= before


# -- the parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_npy_file_can_be_read_at_any_time(shape, tmp_path):
    path = tmp_path / "a.npy"
    file = NpyFile(path, np.dtype("<f4"), shape)
    assert np.load(path).shape == (0, *shape)
    rows = np.arange(1200 * int(np.prod(shape)), dtype="f4").reshape(1200, *shape)
    for start in range(0, 1200, 100):
        file.append(rows[start : start + 100])
        file.flush()
        np.testing.assert_array_equal(np.load(path), rows[: start + 100])
    file.append(rows[:7])  # not flushed: nobody sees it
    assert len(np.load(path)) == 1200
    again = NpyFile(path, np.dtype("<f4"), shape, rows=600)
    assert len(np.load(path)) == 600
    again.append(rows[600:])
    again.close()
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), rows)
    with pytest.raises(ValueError, match="with 1201 rows or more"):
        NpyFile(path, np.dtype("<f4"), shape, rows=1201)


def test_file_names():
    assert file_names(0) == ["predictions.npy"]
    assert file_names([0, 0]) == ["0.npy", "1.npy"]
    assert file_names({"a": 0, "b": {"c/d": 0, "c_d": 0}}) == ["a.npy", "b.c_d.npy", "b.c_d_.npy"]


def test_runs():
    assert evenly(10, 7, 3) == [Run(10, 13), Run(13, 15), Run(15, 17)]
    assert next_runs(0, 100, 2, 8) == [Run(0, 8), Run(8, 16)]
    assert next_runs(96, 99, 2, 8) == [Run(96, 98), Run(98, 99)]
    assert next_runs(99, 100, 4, 8) == [Run(99, 100), Run(100, 100), Run(100, 100), Run(100, 100)]
    assert next_runs(5, None, 2, 3) == [Run(5, 8), Run(8, 11)]


def test_pace():
    pace = Pace(2)
    assert pace.limit == 1
    pace.observe([1, 0], [2**20, 0], [0.001, 0.0])
    assert pace.limit == 8  # 8 MiB
    pace.observe([8, 8], [2**20, 8], [0.001, 0.001])
    assert pace.limit == 64
    pace.observe([64, 64], [0, 0], [6.4, 3.2])  # 0.1 s per batch on the slower one
    assert pace.limit == 5
    pace.observe([0, 0], [0, 0], [0, 0])
    assert pace.limit == 5
    many = Pace(64)
    many.observe([1] * 64, [2**20] * 64, [0.001] * 64)
    assert many.limit == 1  # rank 0 holds 64 times as much


def test_progress(capsys):
    progress = Progress("predict", 60_000, 100, 2, (10_000, 20))
    line = progress.line(35_000, 60, 5.0)
    assert line == "predict: 35,000/60,000 rows [==============          ] 60%, 5,000 rows/s, 5.0 s left"
    assert Progress("predict", None, None, 1).line(70, 3, 2.0) == "predict: 70 rows, 35 rows/s"
    progress.finish(60_000)
    Progress("predict", 1, 1, 0).finish(1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "predict: 50,000 rows in" in err
    assert "10,000 before" in err
    assert [duration(s) for s in (0.25, 59.4, 200, 7500)] == ["0.2 s", "59 s", "3 min 20 s", "2 h 5 min"]
