"""Training that survives ranks that leave and takes in ranks that come."""

from hvdext.elastic.callbacks import CommitStateCallback, UpdateBatchStateCallback, UpdateEpochStateCallback
from hvdext.elastic.running import run
from hvdext.elastic.state import KerasState, State, TensorFlowKerasState, TensorFlowState

__all__ = [
    "CommitStateCallback",
    "KerasState",
    "State",
    "TensorFlowKerasState",
    "TensorFlowState",
    "UpdateBatchStateCallback",
    "UpdateEpochStateCallback",
    "run",
]
