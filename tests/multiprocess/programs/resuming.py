"""A DiLoCo run that loses a rank in the middle of a round, and the run that takes it up again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import keras
import numpy as np

EPOCHS = 4
STEPS = 5  # per epoch; a round has 7


def straight() -> list:
    """Trains without interruption; then once more, until rank 1 is killed in the third epoch."""
    import hvdext as hvd

    hvd.init()
    weights = _train(hvd, [])
    Path(_folder(), f"straight{hvd.rank()}.npy").write_bytes(np.concatenate(weights).tobytes())

    def die(batch, logs):
        if lost.epoch == 2 and batch == 0 and hvd.rank() == 0:
            there.touch()
        if lost.epoch == 2 and batch == 1 and hvd.rank() == 1:
            while (
                not there.exists()
            ):  # with its backup of the epoch before: within a round, ranks wait for nobody
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    there = Path(_folder(), "rank 0 is in the third epoch")

    lost = _Epochs(die)
    _train(hvd, [_backup(hvd), lost])
    return []


def resumed() -> list:
    """Takes the killed run up; returns the largest difference to the one that was never interrupted."""
    import hvdext as hvd

    hvd.init()
    epochs = _Epochs(lambda batch, logs: None)
    weights = np.concatenate(_train(hvd, [_backup(hvd), epochs]))
    expected = np.frombuffer(Path(_folder(), f"straight{hvd.rank()}.npy").read_bytes(), np.float32)
    apart = hvd.allgather_object(weights)
    return [
        epochs.first,
        float(np.max(np.abs(weights - expected))),
        float(np.max(np.abs(apart[0] - apart[1]))),
    ]


class _Epochs(keras.callbacks.Callback):
    def __init__(self, on_batch):
        super().__init__()
        self.first = self.epoch = None
        self.on_train_batch_end = on_batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.first = epoch if self.first is None else self.first


def _train(hvd, callbacks):
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(1, name="out"),
        ],
        name="resumed",
    )
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(scale=0.5, size=w.shape) for w in model.get_weights()])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=False)
    x = np.random.default_rng(hvd.rank()).normal(size=(4 * STEPS, 3)).astype("float32")
    sync = hvd.sync.DiLoCo(every=7, outer=keras.optimizers.SGD(0.7, momentum=0.9, nesterov=True))
    model.fit(
        x,
        x.sum(axis=1),
        batch_size=4,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[sync, *callbacks],
    )
    return [np.ravel(w) for w in model.get_weights()]


def _backup(hvd):
    return keras.callbacks.BackupAndRestore(str(Path(_folder(), f"backup{hvd.rank()}")))


def _folder():
    return os.environ["RESUME_FOLDER"]
