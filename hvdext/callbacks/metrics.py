"""Metrics of the whole job instead of one rank's share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras

from hvdext.comm import current


class MetricAverageCallback(keras.callbacks.Callback):
    """Averages the epoch's logs over the ranks, weighted by the samples each rank has seen.

    Put it before the callbacks that read the logs (checkpoints, early stopping, TensorBoard): they then see
    the same, averaged values on every rank, as does the history that `fit` returns. Training metrics are
    weighted by training samples, `val_` metrics by validation samples. A value that only some ranks log is
    averaged over those.

    Means of per-sample values (losses, accuracies) come out as one process over all samples would give
    them; others (AUC, precision) as the weighted mean of the ranks' values.

    Args:
        device: accepted for Horovod's sake; the few numbers travel through the host's memory.
    """

    def __init__(self, device: str = ""):
        super().__init__()
        self._training_samples = 0.0
        self._validation_samples = 0.0
        del device

    def on_train_begin(self, logs=None):
        current()  # complains now rather than after the first epoch

    def on_epoch_begin(self, epoch, logs=None):
        self._training_samples = self._validation_samples = 0.0

    def on_test_begin(self, logs=None):
        self._training_samples = self._samples()  # validation is about to count anew

    def on_test_end(self, logs=None):
        self._validation_samples = self._samples()

    def on_epoch_end(self, epoch, logs=None):
        training = self._training_samples or self._samples()
        mine = (dict(logs or {}), training, self._validation_samples)
        everyone = current().allgather_object(mine, "hvdext.metrics.epoch")
        if logs is not None:
            logs.update(average_logs(everyone))

    def _samples(self):
        # Keras weighs the mean of the loss by the batch sizes, so its weight is the number of samples.
        tracker = getattr(self.model, "_loss_tracker", None)
        return 0.0 if tracker is None else float(tracker.count)


def average_logs(everyone: Sequence[tuple[Mapping[str, float], float, float]]) -> dict[str, float]:
    """Weighted means of the ranks' logs.

    Args:
        everyone: (logs, training samples, validation samples) of each rank, in rank order. If no rank
            with a value has counted samples, its values are weighted alike.

    Returns:
        One float per key that any rank has logged.
    """
    averages = {}
    for key in dict.fromkeys(key for logs, _, _ in everyone for key in logs):
        pairs = [
            (float(logs[key]), validation if key.startswith("val_") else training)
            for logs, training, validation in everyone
            if key in logs
        ]
        total = sum(weight for _, weight in pairs)
        if total == 0:
            pairs, total = [(value, 1.0) for value, _ in pairs], float(len(pairs))
        averages[key] = sum(value * weight for value, weight in pairs if weight) / total
    return averages
