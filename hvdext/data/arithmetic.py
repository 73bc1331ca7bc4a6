"""Arithmetic of a cluster's batch: pure functions of numbers that every rank knows.

With S ranks, a batch of B samples per rank and A local micro-batches per update
(`backward_passes_per_step`), one update of the weights sees G = B * S * A samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hvdext.common.checks import require_choice, require_positive, require_whole


def global_batch_size(per_rank: int, size: int, backward_passes_per_step: int = 1) -> int:
    """Samples that all ranks together put into one update of the weights.

    Args:
        per_rank: samples in one batch of one rank, at least 1.
        size: number of ranks, at least 1.
        backward_passes_per_step: batches that a rank accumulates per update, at least 1.

    Raises:
        ValueError: if an argument is not an integer of at least 1.
    """
    require_whole("per_rank", per_rank, 1)
    return per_rank * _batches_per_update(size, backward_passes_per_step)


def per_rank_batch_size(global_batch: int, size: int, backward_passes_per_step: int = 1) -> int:
    """Samples in one batch of one rank so that an update sees `global_batch` samples.

    Args:
        global_batch: samples per update over all ranks, at least 1.
        size: number of ranks, at least 1.
        backward_passes_per_step: batches that a rank accumulates per update, at least 1.

    Raises:
        ValueError: if an argument is not an integer of at least 1, or `global_batch` does not
            divide by `size * backward_passes_per_step`.
    """
    require_whole("global_batch", global_batch, 1)
    parts = _batches_per_update(size, backward_passes_per_step)
    if global_batch % parts:
        raise ValueError(
            f"`global_batch` must divide by size * backward_passes_per_step = {parts}. "
            f"Received: global_batch={global_batch!r}, size={size!r}, "
            f"backward_passes_per_step={backward_passes_per_step!r}."
        )
    return global_batch // parts


def scale_learning_rate(
    base: float, size: int, backward_passes_per_step: int = 1, rule: str = "linear"
) -> float:
    """Learning rate for a global batch k = size * backward_passes_per_step times as large.

        linear: base * k         Goyal et al. 2017 (arXiv:1706.02677), with a warm-up of some epochs
        sqrt:   base * sqrt(k)   Krizhevsky 2014 (arXiv:1404.5997), Hoffer et al. 2017
                                 (arXiv:1705.08741): keeps the variance of an update

    Both hold for gradients that are averaged over ranks and micro-batches. A sum of gradients is
    k times their average already: keep `base` for SGD then.

    Args:
        base: learning rate that suits one rank and one batch per update, above 0.
        size: number of ranks, at least 1.
        backward_passes_per_step: batches that a rank accumulates per update, at least 1.
        rule: "linear" or "sqrt".

    Raises:
        ValueError: if an argument is out of its range.
    """
    require_positive("base", base)
    require_choice("rule", rule, ("linear", "sqrt"))
    k = _batches_per_update(size, backward_passes_per_step)
    return base * (k if rule == "linear" else math.sqrt(k))


def batch_weights(batch_sizes: Sequence[int]) -> np.ndarray:
    """Weights that make the plain average of ranks' means the mean over all samples.

    With n_r samples on rank r and w_r = n_r * S / (n_1 + ... + n_S),

        1/S * sum_r w_r * mean_r  =  mean over all samples.

    Multiply rank r's loss, or its `sample_weight`, by `w_r` in a step whose batches differ in
    size; `last_batch_sizes` gives these sizes. Equal sizes give ones.

    Args:
        batch_sizes: samples of each rank in that step, in rank order, each at least 1.

    Returns:
        float64 array of shape (ranks,), with mean 1.

    Raises:
        ValueError: if there are no sizes, or one is not an integer of at least 1.
    """
    if len(batch_sizes) == 0:
        raise ValueError(f"`batch_sizes` must not be empty. Received: batch_sizes={batch_sizes!r}.")
    for batch_size in batch_sizes:
        require_whole("batch_sizes", batch_size, 1)
    sizes = np.asarray(batch_sizes, dtype=np.float64)
    return sizes * len(sizes) / sizes.sum()


def _batches_per_update(size: int, backward_passes_per_step: int) -> int:
    require_whole("size", size, 1)
    require_whole("backward_passes_per_step", backward_passes_per_step, 1)
    return size * backward_passes_per_step
