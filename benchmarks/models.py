"""The CNN that the benchmarks train, and real images for it."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
import datasets

HELD_OUT = 10_000  # training images that learning rates are chosen on


def cnn() -> keras.Model:
    """A CNN of 420,042 parameters for 28x28 images and 10 classes; returns logits."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(512, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    assert model.count_params() == 420_042
    return model


def images(held_out: bool):
    """Fashion-MNIST as (train images, train labels), (test images, test labels).

    Args:
        held_out: test on the last of the training images, which are not trained on then.
    """
    train, test = datasets.load("fashion-mnist")
    if held_out:
        test = tuple(part[-HELD_OUT:] for part in train)
        train = tuple(part[:-HELD_OUT] for part in train)
    return train, test


def batches(split, batch_size: int, seed: int) -> tf.data.Dataset:
    """Batches without end, shuffled anew in each epoch.

    Args:
        split: (images, labels).
        batch_size: rows per batch.
        seed: of the order.
    """
    inputs, targets = (tf.constant(part) for part in split)
    order = tf.data.Dataset.range(len(inputs)).shuffle(len(inputs), seed).repeat().batch(batch_size)
    return order.map(lambda rows: (tf.gather(inputs, rows), tf.gather(targets, rows))).prefetch(2)


def accuracy(model: keras.Model, split) -> float:
    """The share of images that the model puts into the right class."""
    inputs, targets = split
    logits = model.predict(inputs, batch_size=500, verbose=0)
    return float(np.mean(np.argmax(logits, -1) == targets))
