"""Predictions streamed to a folder by ranks of which one is killed in the middle; each run is a launch."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import keras
import numpy as np

BATCH, BATCHES = 8, 3000


class Rows(keras.utils.PyDataset):
    """Kills rank `PREDICT_KILL` when it asks for a batch after `PREDICT_AT`."""

    def __init__(self, rank):
        super().__init__()
        self._dies = os.environ.get("PREDICT_KILL") == str(rank)
        self.asked: list[int] = []

    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        if self._dies and index > int(os.environ["PREDICT_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked.append(index)
        return (rows(index),)


def rows(index) -> np.ndarray:
    """The rows of a batch."""
    return np.random.default_rng([5, index]).normal(size=(BATCH, 6)).astype("float32")


def make_model() -> keras.Model:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    generator = np.random.default_rng(1)
    model.set_weights([generator.normal(size=w.shape) for w in model.get_weights()])
    return model


def stream() -> dict:
    """Predicts, or goes on; returns what rank 0 then has against plain Keras."""
    import hvdext as hvd

    hvd.init()
    data = Rows(hvd.rank())
    found = hvd.predict(make_model(), data, output=os.environ["PREDICT_FOLDER"], resume=True, verbose=0)
    if hvd.rank():
        return {"asked": data.asked}
    plain = make_model().predict(np.concatenate([rows(i) for i in range(BATCHES)]), BATCH, verbose=0)
    is_same = bool(np.array_equal(found, plain)) and type(found) is np.memmap
    return {
        "asked": data.asked,
        "is_same": is_same,
        "files": sorted(p.name for p in Path(os.environ["PREDICT_FOLDER"]).iterdir()),
    }
