"""Training that survives ranks that leave and takes in ranks that come."""

from hvdext.common.public_names import unknown_name
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


def __getattr__(name: str) -> None:
    raise unknown_name(__name__, name, __all__)
