"""Real images for the examples, as arrays: nothing here knows of ranks."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

Split = tuple[np.ndarray, np.ndarray]

_FASHION_FOLDERS = (
    "/usr/share/datasets/fashion-mnist",  # Debian's package dataset-fashion-mnist
    "~/.keras/datasets/fashion-mnist",
)


def load(name: str) -> tuple[Split, Split]:
    """Returns (train images, train labels), (test images, test labels).

    Args:
        name: "digits" (1,797 images of 8x8 that scikit-learn ships) or "fashion-mnist" (70,000 of 28x28, from
            the folder FASHION_MNIST, a folder where it is usually installed, or downloaded by Keras).

    Returns:
        Images as float32 of shape (n, height, width, 1) in [0, 1], labels as int64 of shape (n,).
    """
    return {"digits": _digits, "fashion-mnist": _fashion_mnist}[name]()


def _digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = (images[order].reshape(-1, 8, 8, 1) / 16).astype("float32")
    labels = labels[order]
    return (images[360:], labels[360:]), (images[:360], labels[:360])


def _fashion_mnist():
    folders = [os.environ.get("FASHION_MNIST", ""), *_FASHION_FOLDERS]
    for folder in (Path(folder).expanduser() for folder in folders if folder):
        if (folder / "train-images-idx3-ubyte.gz").exists():
            return _idx_split(folder, "train"), _idx_split(folder, "t10k")
    import keras

    train, test = keras.datasets.fashion_mnist.load_data()
    return _scaled(*train), _scaled(*test)


def _idx_split(folder, part):
    """Reads images and labels in the IDX format: a header of big-endian int32, then bytes."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return _scaled(images, labels)


def _scaled(images, labels):
    return (images[..., np.newaxis] / 255).astype("float32"), labels.astype("int64")
