"""Sharding of data over ranks, and the arithmetic of a cluster's batch."""

from hvdext.common.public_names import unknown_name
from hvdext.data.arithmetic import (
    batch_weights,
    global_batch_size,
    per_rank_batch_size,
    scale_learning_rate,
)
from hvdext.data.by_load import SharedByLoad, shared_by_load
from hvdext.data.py_dataset import EndlessPyDataset, ShardedPyDataset
from hvdext.data.sampler import last_batch_sizes, samples_of_rank, steps_per_epoch
from hvdext.data.sharded_dataset import ShardedDataset
from hvdext.data.sharding import shard

__all__ = [
    "EndlessPyDataset",
    "ShardedDataset",
    "ShardedPyDataset",
    "SharedByLoad",
    "batch_weights",
    "global_batch_size",
    "last_batch_sizes",
    "per_rank_batch_size",
    "samples_of_rank",
    "scale_learning_rate",
    "shard",
    "shared_by_load",
    "steps_per_epoch",
]


def __getattr__(name: str) -> None:
    raise unknown_name(__name__, name, __all__)
