"""Every kind of input that `hvd.predict` takes, with what plain Keras takes for the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

ROWS = 53
BATCH = 4  # 14 batches, the last of one row


@dataclass(frozen=True)
class Kind:
    """`x` and `plain` make the input from a folder to write to; `plain` is what `model.predict` is given."""

    model: Callable[[], keras.Model]
    x: Callable[[Path], Any]
    plain: Callable[[], Any] | None = None
    batch_size: int | None = BATCH
    options: Callable[[], dict] = dict


def numbers(rows=ROWS, width=6, dtype="float64"):
    return np.random.default_rng(3).normal(size=(rows, width)).astype(dtype)


def labels():
    return np.arange(ROWS)


def seeded(model: keras.Model) -> keras.Model:
    """The same weights wherever it is made."""
    generator = np.random.default_rng(11)
    model.set_weights([generator.normal(size=w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def small(**compiled) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)]
    )
    if compiled:
        model.compile("sgd", "mse", **compiled)
    return seeded(model)


def two_inputs(as_list=False) -> keras.Model:
    one, two = keras.Input((6,), name="one"), keras.Input((2,), name="two")
    hidden = keras.layers.Dense(5)(one)
    joined = keras.layers.Concatenate()([hidden, two])
    outputs = {"sum": keras.layers.Dense(2)(joined), "parts": [hidden, keras.layers.Dense(1)(two)]}
    inputs = [one, two] if as_list else {"one": one, "two": two}
    return seeded(keras.Model(inputs, outputs))


def both():
    return {"one": numbers(), "two": numbers(width=2, dtype="float32")}


def of_text() -> keras.Model:
    inputs = keras.Input((), dtype="string")
    found = keras.layers.StringLookup(vocabulary=["a", "b", "c"])(inputs)
    return seeded(keras.Model(inputs, keras.layers.Embedding(5, 3)(found)))


def texts():
    return np.array(["a", "b", "x"], dtype=object)[np.arange(ROWS) % 3]


def of_sequences() -> keras.Model:
    inputs = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Embedding(7, 3, mask_zero=True)(inputs)
    return seeded(keras.Model(inputs, keras.layers.LSTM(2, return_sequences=True)(hidden)))


def sequences():
    """Batches that are padded to different lengths: the predictions of all are ragged."""
    lengths = [1 + i % 5 for i in range(ROWS)]
    rows = tf.data.Dataset.from_tensor_slices(
        tf.ragged.constant([[1 + i % 6] * n for i, n in enumerate(lengths)])
    )
    return rows.map(lambda row: row).padded_batch(BATCH)


class TextOut(keras.Model):
    """A model whose predictions are text, made of no weights at all."""

    def call(self, inputs):
        return tf.strings.as_string(tf.argmax(inputs, axis=-1))


class RaggedOut(keras.Model):
    """A model that gives a ragged tensor and one number per batch."""

    def call(self, inputs):
        return tf.RaggedTensor.from_tensor(inputs, lengths=tf.range(tf.shape(inputs)[0]) % 4), tf.reduce_sum(
            inputs
        )


class OwnStep(keras.Model):
    """A `predict_step` of the user's own, which looks at the targets."""

    def predict_step(self, data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        return tf.reduce_sum(x, axis=1) + tf.cast(y, x.dtype)


def in_bfloat16() -> keras.Model:
    with_policy = keras.layers.Dense(3, dtype="bfloat16")
    return seeded(keras.Sequential([keras.Input((6,)), with_policy]))


class Indexed(keras.utils.PyDataset):
    """Batches by number; notes which were asked for."""

    def __init__(self, x, y=None):
        super().__init__()
        self.x, self.y = x, y
        self.asked: list[int] = []

    def __len__(self):
        return -(-len(self.x) // BATCH)

    def __getitem__(self, index):
        self.asked.append(index)
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self.x[rows] if self.y is None else (self.x[rows], self.y[rows])


def dataset(*parts):
    return tf.data.Dataset.from_tensor_slices(parts if len(parts) > 1 else parts[0]).batch(BATCH)


def of_unknown_length(*parts):
    return dataset(*parts).filter(lambda *element: True)


def uneven_batches():
    x = numbers(dtype="float32")
    sizes = [7, 1, 2, 20, 3, 5, 1, 1, 10, 3]

    def batches():
        start = 0
        for size in sizes:
            yield x[start : start + size]
            start += size

    return tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec((None, 6)))


def npy_folder(folder: Path, array, sizes=(10, 1, 0, 30, 12)) -> Path:
    """`array` in several files, whose borders lie within batches."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for number, size in enumerate(sizes):
        np.save(folder / f"part{number}.npy", array[start : start + size])
        start += size
    return folder


def npy_folders(folder: Path) -> Path:
    for name, array in both().items():
        npy_folder(folder / name, array)
    return folder


def record_folder(folder: Path, options=None, ending="") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(numbers(dtype="float32"), 3)):
        with tf.io.TFRecordWriter(str(folder / f"rows.tfrecord-{number}{ending}"), options) as writer:
            for row in rows:
                writer.write(row.tobytes())
    return folder


def parse(record):
    return tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [6]), tf.constant(1.0)


KINDS = {
    "float64 array": Kind(small, lambda folder: numbers()),
    "default batch size": Kind(small, lambda folder: numbers(), batch_size=None),
    "tensor": Kind(small, lambda folder: tf.constant(numbers())),
    "float16, mapped": Kind(small, lambda folder: numbers(dtype="float16")),
    "dict in, nested out": Kind(two_inputs, lambda folder: both()),
    "list in": Kind(lambda: two_inputs(as_list=True), lambda folder: list(both().values())),
    "tuple in": Kind(lambda: two_inputs(as_list=True), lambda folder: tuple(both().values())),
    "text in": Kind(of_text, lambda folder: texts()),
    "text tensor in": Kind(of_text, lambda folder: tf.constant(texts())),
    "text out": Kind(TextOut, lambda folder: numbers()),
    "ragged out, scalar per batch": Kind(RaggedOut, lambda folder: numbers()),
    "bfloat16 out": Kind(in_bfloat16, lambda folder: numbers()),
    "masks and ragged predictions": Kind(of_sequences, lambda folder: sequences(), batch_size=None),
    "compiled, several steps per execution": Kind(
        lambda: small(steps_per_execution=3), lambda folder: numbers()
    ),
    "compiled by XLA": Kind(lambda: small(jit_compile=True), lambda folder: numbers()),
    "eager": Kind(lambda: small(run_eagerly=True), lambda folder: numbers()),
    "data set with targets": Kind(
        small, lambda folder: dataset(numbers(dtype="float32"), labels()), batch_size=None
    ),
    "data set, own step": Kind(
        OwnStep, lambda folder: dataset(numbers(dtype="float32"), labels()), batch_size=None
    ),
    "data set of dicts": Kind(two_inputs, lambda folder: dataset(both()), batch_size=None),
    "data set of unknown length": Kind(
        small, lambda folder: of_unknown_length(numbers(dtype="float32")), batch_size=None
    ),
    "data set of uneven batches": Kind(small, lambda folder: uneven_batches(), batch_size=None),
    "PyDataset": Kind(small, lambda folder: Indexed(numbers(dtype="float32")), batch_size=None),
    "PyDataset with targets": Kind(small, lambda folder: Indexed(numbers(), labels()), batch_size=None),
    "folder": Kind(small, lambda folder: npy_folder(folder, numbers()), numbers),
    "folder of folders": Kind(two_inputs, npy_folders, both),
    "records": Kind(small, record_folder, lambda: numbers(dtype="float32"), options=lambda: {"parse": parse}),
    "packed records": Kind(
        small,
        lambda folder: record_folder(folder, "GZIP", ".gz"),
        lambda: numbers(dtype="float32"),
        options=lambda: {"parse": parse},
    ),
}
