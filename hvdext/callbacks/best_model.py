"""The best model of all epochs in one file."""

from __future__ import annotations

import os

import keras

from hvdext.callbacks.meeting import meet, raise_of_rank_0
from hvdext.comm.current import current
from hvdext.comm.failures import told
from hvdext.common.arguments import suggests_keywords


class BestModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the model whenever `monitor` is better than ever before; rank 0 alone writes.

    Put it after `MetricAverageCallback`, or into `AsOneProcess`, so that the best is judged on the logs of
    all ranks. `best` is the same on every rank.

    Args:
        monitor: the name in the logs to judge by.
        verbose: 1: rank 0 prints what it saves.
        save_weights_only: whether to save the weights instead of the model.
        mode: "min", "max", or "auto" to tell it from the metric.
        save_freq: "epoch", or after how many batches to save, judged on rank 0's logs.
        filepath: the file, ending in `.keras` (`.weights.h5` for weights); may hold `{epoch}` and names from
            the logs. Also an attribute, which may be set until training begins.

    Raises:
        ValueError: when training begins, on every rank alike, if rank 0's `filepath` is None or has another
            ending.
        OSError: on every rank, or an error of another fitting class, if rank 0 cannot save; rank 0 raises its
            own.
    """

    runs_on_one_rank = True  # a pipeline, which all ranks save together, refuses it

    @suggests_keywords
    def __init__(
        self,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int = "epoch",
        *,
        filepath: str | os.PathLike | None = None,
    ):
        super().__init__(
            filepath="unset.weights.h5" if save_weights_only else "unset.keras",
            monitor=monitor,
            verbose=verbose,
            save_best_only=True,
            save_weights_only=save_weights_only,
            mode=mode,
            save_freq=save_freq,
        )
        self.best: float | None = None
        self.filepath = filepath
        self._failure: Exception | None = None

    def on_train_begin(self, logs=None):
        self._failure = None
        problem = meet(current(), "BestModelCheckpoint.on_train_begin", self._problem())[0]
        if problem is not None:
            raise ValueError(problem)
        if self.filepath is not None:
            self.filepath = os.fspath(self.filepath)

    def on_train_batch_end(self, batch, logs=None):
        if current().rank == 0:
            self._try(super().on_train_batch_end, batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        comm = current()
        if comm.rank == 0:
            self._try(super().on_epoch_end, epoch, logs)
        failure = None if self._failure is None else told(self._failure)
        best = None if self.best is None else float(self.best)
        failure, self.best = meet(comm, "BestModelCheckpoint.on_epoch_end", (failure, best))[0]
        raise_of_rank_0(comm, failure, "BestModelCheckpoint has failed", self._failure)

    def _try(self, hook, *args):
        """Keeps an error until the epoch's end, where the other ranks can hear of it."""
        if self._failure is None:
            try:
                hook(*args)
            except Exception as error:
                self._failure = error

    def _problem(self):
        ending = ".weights.h5" if self.save_weights_only else ".keras"
        endings = (ending,) if self.save_weights_only else (ending, ".h5")
        if self.filepath is not None and os.fspath(self.filepath).endswith(endings):
            return None
        return (
            f"`filepath` must be a file name that ends in '{ending}': pass it to hvd.callbacks."
            f"BestModelCheckpoint or set its attribute before training. Received: filepath={self.filepath!r}."
        )
