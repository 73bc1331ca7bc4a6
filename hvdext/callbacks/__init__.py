"""Keras callbacks for `model.fit` on many ranks."""

from hvdext.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdext.callbacks.metrics import MetricAverageCallback

__all__ = ["BroadcastGlobalVariablesCallback", "MetricAverageCallback"]
