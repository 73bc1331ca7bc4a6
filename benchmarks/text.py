"""Text without a download, and a small transformer for it.

The text is Python's own: the standard library's sources, byte by byte. Every tenth file is for validation.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

CONTEXT = 32  # bytes that a prediction may look at
WIDTH = 32
HEADS = 2
LAYERS = 2
VALIDATION_WINDOWS = 2048


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns (training bytes, validation bytes), uint8 of shape (n,), the same for the same Python."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    contents = [file.read_bytes() for file in files]
    validation = contents[::10]
    train = [content for i, content in enumerate(contents) if i % 10]
    return np.frombuffer(b"".join(train), np.uint8), np.frombuffer(b"".join(validation), np.uint8)


def batches(text: np.ndarray, batch_size: int, seed: int) -> tf.data.Dataset:
    """Windows from anywhere in the text, without end: (bytes, the bytes that follow each).

    Args:
        text: uint8 of shape (n,).
        batch_size: windows per batch.
        seed: of the places.
    """
    numbers = tf.data.Dataset.random(seed).batch(batch_size)
    content = tf.constant(text)
    places = len(text) - CONTEXT

    def cut(drawn):
        starts = drawn % places
        return _pairs(tf.gather(content, starts[:, tf.newaxis] + tf.range(CONTEXT + 1, dtype=tf.int64)))

    return numbers.map(cut).prefetch(2)


def validation(text: np.ndarray) -> tf.data.Dataset:
    """Windows at even distances over the text, each seen once."""
    starts = np.linspace(0, len(text) - CONTEXT - 1, VALIDATION_WINDOWS).astype(np.int64)
    windows = text[starts[:, np.newaxis] + np.arange(CONTEXT + 1)]
    return tf.data.Dataset.from_tensor_slices(windows).batch(64).map(_pairs)


def transformer() -> keras.Model:
    """Predicts the next byte at each place; returns logits of shape (batch, CONTEXT, 256)."""
    inputs = keras.Input((CONTEXT,), dtype="int32")
    x = keras.layers.Embedding(256, WIDTH)(inputs)
    x = Positions()(x)
    for _ in range(LAYERS):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        x = keras.layers.Add()([x, y])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(4 * WIDTH, activation="gelu")(y)
        x = keras.layers.Add()([x, keras.layers.Dense(WIDTH)(y)])
    x = keras.layers.LayerNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(256)(x))


class Positions(keras.layers.Layer):
    """Adds a learned vector for each place."""

    def build(self, shape):
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal", name="table")

    def call(self, x):
        return x + self.table


def _pairs(windows):
    windows = tf.cast(windows, tf.int32)
    return windows[:, :-1], windows[:, 1:]
