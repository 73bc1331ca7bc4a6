"""Horovod for Keras 3 on TensorFlow: `import hvdext as hvd`.

Names are loaded on first use, so that the command line and the engine's builder start without TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

from hvdext.common.public_names import MODULES, unknown_name

_HOMES = {
    "ColumnDense": "hvdext.placement.slices.dense",
    "Compression": "hvdext.collectives.compression",
    "DistributedGradientTape": "hvdext.gradients.tape",
    "DistributedOptimizer": "hvdext.gradients.optimizer",
    "Grid": "hvdext.comm.grid",
    "PartialDistributedGradientTape": "hvdext.gradients.partial",
    "PartialDistributedOptimizer": "hvdext.gradients.partial",
    "Plan": "hvdext.placement.plan.plan",
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
    "allgather": "hvdext.collectives.tensors",
    "allgather_object": "hvdext.collectives.objects",
    "allreduce": "hvdext.collectives.tensors",
    "alltoall": "hvdext.collectives.tensors",
    "barrier": "hvdext.launch.topology",
    "broadcast": "hvdext.collectives.tensors",
    "broadcast_": "hvdext.collectives.tensors",
    "broadcast_global_variables": "hvdext.collectives.variables",
    "broadcast_object": "hvdext.collectives.objects",
    "broadcast_variables": "hvdext.collectives.variables",
    "ccl_built": "hvdext.comm.build_info",
    "cross_rank": "hvdext.launch.topology",
    "cross_size": "hvdext.launch.topology",
    "cuda_built": "hvdext.comm.build_info",
    "ddl_built": "hvdext.comm.build_info",
    "deploy": "hvdext.inference.deploy.deploy",
    "evaluate": "hvdext.inference.predict.evaluate",
    "global_process_set": "hvdext.comm.process_sets",
    "gloo_built": "hvdext.comm.build_info",
    "gloo_enabled": "hvdext.comm.build_info",
    "grouped_allgather": "hvdext.collectives.tensors",
    "grouped_allreduce": "hvdext.collectives.tensors",
    "grouped_reducescatter": "hvdext.collectives.tensors",
    "init": "hvdext.launch.runtime",
    "is_homogeneous": "hvdext.launch.topology",
    "is_initialized": "hvdext.launch.runtime",
    "join": "hvdext.gradients.join",
    "largest_difference": "hvdext.collectives.variables",
    "load_model": "hvdext.gradients.load_model",
    "loss_weight": "hvdext.collectives.loss_weight",
    "load_uncut": "hvdext.placement.slices.saving",
    "local_rank": "hvdext.launch.topology",
    "local_rank_op": "hvdext.launch.topology",
    "local_size": "hvdext.launch.topology",
    "local_size_op": "hvdext.launch.topology",
    "mpi_built": "hvdext.comm.build_info",
    "mpi_enabled": "hvdext.comm.build_info",
    "mpi_threads_supported": "hvdext.comm.build_info",
    "nccl_built": "hvdext.comm.build_info",
    "pipeline": "hvdext.placement.pipeline.pipeline",
    "place": "hvdext.placement.devices",
    "plan": "hvdext.placement.plan.planner",
    "predict": "hvdext.inference.predict.predict",
    "process_set_included_op": "hvdext.launch.topology",
    "rank": "hvdext.launch.topology",
    "rank_op": "hvdext.launch.topology",
    "reducescatter": "hvdext.collectives.tensors",
    "remove_process_set": "hvdext.comm.registration",
    "rocm_built": "hvdext.comm.build_info",
    "run": "hvdext.launch.run",
    "save_uncut": "hvdext.placement.slices.saving",
    "shutdown": "hvdext.launch.runtime",
    "size": "hvdext.launch.topology",
    "size_op": "hvdext.launch.topology",
    "slice_layers": "hvdext.placement.slices.slicing",
    "start_timeline": "hvdext.launch.timeline",
    "stop_timeline": "hvdext.launch.timeline",
    "traffic": "hvdext.launch.topology",
    "verbose": "hvdext.launch.topology",
}
_OPS = {
    "Adasum": "ADASUM",
    "Average": "AVERAGE",
    "Max": "MAX",
    "Min": "MIN",
    "Product": "PRODUCT",
    "Sum": "SUM",
}

__all__ = sorted([*_HOMES, *_OPS, *MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _OPS:
        value = importlib.import_module("hvdext.collectives.reduce_op").ReduceOp[_OPS[name]]
    elif name in MODULES:
        value = importlib.import_module(f"hvdext.{name}")
    else:
        raise unknown_name("hvdext", name, __all__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
