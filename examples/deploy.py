"""Loads on every rank a model that only one rank has the file of.

    horovodrun -np 2 python examples/deploy.py
    horovodrun -np 2 python examples/deploy.py --model model.keras    # one of your own, for images of digits
    python examples/deploy.py                                         # one process

Rank 0 trains a model on real images and saves it in a folder of its own. `hvd.deploy` brings the file to
every other host, once, and loads it on every rank; the ranks then share the test images. Three forms are
shown: a .keras file, the folder of a SavedModel, and weights for a model that each rank builds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import datasets
import keras
import numpy as np

import hvdext as hvd


def main():
    options = parse_arguments()
    hvd.init()
    _, (x, y) = datasets.load("digits")
    x, y = x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()]

    with tempfile.TemporaryDirectory() as folder:
        paths = [options.model] if options.model else save(Path(folder))
        for path in paths:
            model = hvd.deploy(path, model=build() if path.name.endswith(".weights.h5") else None)
            right = int(np.sum(model.predict(x, verbose=0).argmax(axis=-1) == y))
            report(path, hvd.allgather_object((right, len(y))))


def save(folder: Path) -> list[Path]:
    """Rank 0 trains a model and saves it; the others know the names only."""
    paths = [folder / "model.keras", folder / "exported", folder / "model.weights.h5"]
    if hvd.rank() == 0:
        train, _ = datasets.load("digits")
        model = build()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(*train, epochs=6, verbose=0)
        model.save(paths[0])
        model.export(paths[1], verbose=False)
        model.save_weights(paths[2])
    return paths


def build() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def report(path: Path, shares: list[tuple[int, int]]) -> None:
    if hvd.rank() == 0:
        right, images = (sum(column) for column in zip(*shares, strict=True))
        by_rank = [images for _, images in shares]
        print(f"{path.name}: test accuracy {right / images:.4f}; images by rank {by_rank}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a .keras file or a SavedModel that rank 0 has")
    return parser.parse_args()


if __name__ == "__main__":
    main()
