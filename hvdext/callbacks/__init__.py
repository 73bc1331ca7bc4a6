"""Keras callbacks for `model.fit` on many ranks."""

from hvdext.callbacks.best_model import BestModelCheckpoint
from hvdext.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdext.callbacks.learning_rate import LearningRateScheduleCallback, LearningRateWarmupCallback
from hvdext.callbacks.metrics import MetricAverageCallback
from hvdext.callbacks.one_process import AsOneProcess
from hvdext.callbacks.uneven import UnevenBatches
from hvdext.common.public_names import unknown_name
from hvdext.consensus.consensus import ConsensusAveraging
from hvdext.consensus.warmup import WarmupPerturbation
from hvdext.sync.monitor.monitor import SyncMonitor
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


def __getattr__(name: str) -> None:
    raise unknown_name(__name__, name, __all__)
