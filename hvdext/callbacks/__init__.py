"""Keras callbacks for `model.fit` on many ranks."""

from hvdext.callbacks.best_model import BestModelCheckpoint
from hvdext.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdext.callbacks.consensus import ConsensusAveraging
from hvdext.callbacks.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdext.callbacks.metrics import MetricAverageCallback
from hvdext.callbacks.monitor import SyncMonitor
from hvdext.callbacks.one_process import AsOneProcess
from hvdext.callbacks.uneven import UnevenBatches
from hvdext.callbacks.warmup import WarmupPerturbation
from hvdext.sync.parameter_sync import ParameterSync

__all__ = [
    "AsOneProcess",
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "ConsensusAveraging",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
    "ParameterSync",
    "SyncMonitor",
    "UnevenBatches",
    "WarmupPerturbation",
]
