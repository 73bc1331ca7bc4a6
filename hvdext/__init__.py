"""Horovod for Keras 3 on TensorFlow: `import hvdext as hvd`.

Names are loaded on first use, so that the command line and the engine's builder start without TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ColumnDense": "hvdext.placement.slices.dense",
    "Compression": "hvdext.compression",
    "DistributedGradientTape": "hvdext.tape",
    "DistributedOptimizer": "hvdext.optimizer",
    "Grid": "hvdext.comm.grid",
    "PartialDistributedGradientTape": "hvdext.partial",
    "PartialDistributedOptimizer": "hvdext.partial",
    "Plan": "hvdext.placement.plan",
    "ProcessSet": "hvdext.comm.process_sets",
    "RowDense": "hvdext.placement.slices.dense",
    "SlicedConv2D": "hvdext.placement.slices.convolution",
    "SlicedDropout": "hvdext.placement.slices.dropout",
    "SlicedEmbedding": "hvdext.placement.slices.embedding",
    "SlicedGroupQueryAttention": "hvdext.placement.slices.attention",
    "SlicedMultiHeadAttention": "hvdext.placement.slices.attention",
    "SlicedSparseCategoricalAccuracy": "hvdext.placement.slices.losses",
    "SlicedSparseCategoricalCrossentropy": "hvdext.placement.slices.losses",
    "Strategy": "hvdext.strategy",
    "SyncBatchNormalization": "hvdext.sync_batch_norm",
    "add_process_set": "hvdext.comm.registration",
    "allgather": "hvdext.collectives",
    "allgather_object": "hvdext.objects",
    "allreduce": "hvdext.collectives",
    "alltoall": "hvdext.collectives",
    "barrier": "hvdext.runtime",
    "broadcast": "hvdext.collectives",
    "broadcast_": "hvdext.collectives",
    "broadcast_global_variables": "hvdext.variables",
    "broadcast_object": "hvdext.objects",
    "broadcast_variables": "hvdext.variables",
    "ccl_built": "hvdext.comm.build_info",
    "cross_rank": "hvdext.runtime",
    "cross_size": "hvdext.runtime",
    "cuda_built": "hvdext.comm.build_info",
    "ddl_built": "hvdext.comm.build_info",
    "deploy": "hvdext.inference.deploy",
    "evaluate": "hvdext.inference.evaluate",
    "global_process_set": "hvdext.comm.process_sets",
    "gloo_built": "hvdext.comm.build_info",
    "gloo_enabled": "hvdext.comm.build_info",
    "grouped_allgather": "hvdext.collectives",
    "grouped_allreduce": "hvdext.collectives",
    "grouped_reducescatter": "hvdext.collectives",
    "init": "hvdext.runtime",
    "is_homogeneous": "hvdext.runtime",
    "is_initialized": "hvdext.runtime",
    "join": "hvdext.joining",
    "largest_difference": "hvdext.variables",
    "load_model": "hvdext.loading",
    "load_uncut": "hvdext.placement.slices.saving",
    "local_rank": "hvdext.runtime",
    "local_size": "hvdext.runtime",
    "mpi_built": "hvdext.comm.build_info",
    "mpi_enabled": "hvdext.comm.build_info",
    "mpi_threads_supported": "hvdext.comm.build_info",
    "nccl_built": "hvdext.comm.build_info",
    "pipeline": "hvdext.placement.pipeline",
    "place": "hvdext.placement.devices",
    "plan": "hvdext.placement.plan",
    "predict": "hvdext.inference.predict",
    "rank": "hvdext.runtime",
    "reducescatter": "hvdext.collectives",
    "remove_process_set": "hvdext.comm.registration",
    "rocm_built": "hvdext.comm.build_info",
    "run": "hvdext.launching",
    "save_uncut": "hvdext.placement.slices.saving",
    "shutdown": "hvdext.runtime",
    "size": "hvdext.runtime",
    "slice_layers": "hvdext.placement.slices.slicing",
    "start_timeline": "hvdext.timeline",
    "stop_timeline": "hvdext.timeline",
    "traffic": "hvdext.runtime",
    "verbose": "hvdext.runtime",
}
_OPS = {
    "Adasum": "ADASUM",
    "Average": "AVERAGE",
    "Max": "MAX",
    "Min": "MIN",
    "Product": "PRODUCT",
    "Sum": "SUM",
}
_MODULES = ("callbacks", "data", "elastic", "engine", "sync")

__all__ = sorted([*_HOMES, *_OPS, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _OPS:
        value = importlib.import_module("hvdext.reduce_op").ReduceOp[_OPS[name]]
    elif name in _MODULES:
        value = importlib.import_module(f"hvdext.{name}")
    else:
        raise AttributeError(f"module 'hvdext' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
