"""Keras callbacks for `model.fit` on many ranks."""

from hvdext.callbacks.best_model import BestModelCheckpoint
from hvdext.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdext.callbacks.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdext.callbacks.metrics import MetricAverageCallback
from hvdext.callbacks.one_process import AsOneProcess
from hvdext.callbacks.uneven import UnevenBatches

__all__ = [
    "AsOneProcess",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "UnevenBatches",
]
