"""A folder of TFRecord files: raw records in batches, of which a rank parses its own only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf


class Records:
    """The records of all files of a folder with `.tfrecord` in their names, in the order of these names.

    Args:
        folder: where the files are; those that end in `.gz` are unpacked, and then all must.
        parse: makes an element, `x`, `(x, y)` or `(x, y, sample_weight)`, of one record, a scalar string.
        batch_size: records per batch.

    Attributes:
        raw: data set of batches of serialized records.
        spec: the type of a parsed batch.

    Raises:
        ValueError: if there are no such files.
    """

    def __init__(self, folder: Path, parse: Callable[[tf.Tensor], Any], batch_size: int):
        if not folder.is_dir():
            raise ValueError(f"`x` must be a folder that exists. Received: {str(folder)!r}.")
        files = sorted(str(path) for path in folder.iterdir() if ".tfrecord" in path.name and path.is_file())
        packed = {file.endswith(".gz") for file in files}
        if len(packed) != 1:
            found = "both .gz and others" if packed else "none"
            raise ValueError(
                "`x` must be, with `parse`, a folder of files with '.tfrecord' in their names, either all or "
                f"none of them ending in '.gz'. Received: {str(folder)!r} with {found}."
            )
        self.raw = tf.data.TFRecordDataset(files, "GZIP" if packed.pop() else None).batch(batch_size)
        one = tf.data.Dataset.from_tensors(tf.constant("")).map(parse)
        self.spec = one.batch(1).element_spec
        self._parse_all = tf.function(
            lambda records: tf.map_fn(parse, records, fn_output_signature=one.element_spec)
        )

    def parsed(self, records: tf.Tensor) -> Any:
        """A batch as `TFRecordDataset(files).map(parse).batch(batch_size)` would give it."""
        return self._parse_all(records)
