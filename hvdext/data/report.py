"""Tells once, on rank 0, what an epoch leaves out or takes twice."""

from __future__ import annotations

from hvdext.common.log import logger
from hvdext.data.sampler import Sampler, Share

_logger = logger("data")


def report_uneven(sampler: Sampler, share: Share) -> None:
    """Logs a warning on rank 0 if `sampler` drops or repeats anything."""
    if share.rank != 0 or not (sampler.dropped or sampler.repeated):
        return
    count = sampler.dropped or sampler.repeated
    fate = "left out of" if sampler.dropped else "taken twice in"
    _logger.warning(
        "%d of %d %s are %s every epoch (%s), so that %d ranks take %d steps each "
        "(uneven=%r, batch_size=%d).",
        count,
        sampler.total,
        sampler.unit,
        fate,
        "the same ones each time" if share.order.seed is None else "others each time",
        sampler.size,
        sampler.steps,
        sampler.uneven,
        sampler.batch_size,
    )


def report_uncounted(group: int, share: Share) -> None:
    """Logs a warning on rank 0: up to `group - 1` elements of an uncounted data set are dropped."""
    if share.rank == 0 and group > 1:
        _logger.warning(
            "The data set does not know how many elements it has: up to %d at the end of every "
            "epoch are left out, so that %d ranks take equal steps.",
            group - 1,
            share.size,
        )
