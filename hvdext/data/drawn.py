"""What `fit` can see of the order in which data is drawn before it is dealt to the ranks."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdext.data.py_dataset import EndlessPyDataset, ShardedPyDataset
from hvdext.data.same_order import Rows, rows_of_batch
from hvdext.data.sharded_dataset import ShardedDataset
from hvdext.keras_tools.dataset_order import inputs_of


def rows_drawn(x: Any) -> Rows:
    """A few rows of the latest pass; none where there is nothing to see, or all has been compared before.

    Args:
        x: what `fit` trains on: a share, or a `tf.data.Dataset` made of one.
    """
    if isinstance(x, (ShardedPyDataset, EndlessPyDataset)):
        return rows_of_batch(x.first_of_all())
    if isinstance(x, tf.data.Dataset):
        shares = [part for part in inputs_of(x) if isinstance(part, ShardedDataset)]
        return [row for share in shares if share.record is not None for row in share.record.rows()]
    return []
