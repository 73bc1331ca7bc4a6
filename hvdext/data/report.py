"""Tells once, on rank 0, what an epoch leaves out or takes twice."""

from __future__ import annotations

from hvdext.common.log import logger
from hvdext.data.sampler import Deal, Share

_logger = logger("data")


def report_deal(deal: Deal, share: Share) -> None:
    """Logs a warning on rank 0 if `deal` drops or repeats anything."""
    if share.rank != 0 or not (deal.dropped or deal.repeated):
        return
    count, fate = (deal.dropped, "left out of") if deal.dropped else (deal.repeated, "taken twice in")
    _logger.warning(
        "%d of %d %s are %s every epoch (%s), so that %d ranks take %d steps each "
        "(uneven=%r, batch_size=%d).",
        count,
        deal.total,
        deal.unit,
        fate,
        "the same ones each time" if share.order.seed is None else "others each time",
        deal.size,
        deal.steps,
        deal.uneven,
        deal.batch_size,
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
