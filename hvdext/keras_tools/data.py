"""Data sets of `tf.data` with more to them than batches."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


class DatasetAround(tf.data.Dataset):
    """A `tf.data.Dataset` that is another one, for subclasses that know more about it.

    Args:
        dataset: the other one.
    """

    def __init__(self, dataset: tf.data.Dataset):
        self._dataset = dataset
        super().__init__(dataset._variant_tensor)

    @property
    def element_spec(self) -> Any:
        """Type specification of one batch."""
        return self._dataset.element_spec

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._dataset]
