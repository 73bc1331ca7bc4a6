"""A `.npy` file that grows: whoever opens it finds the rows that are done."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"  # of format 1.0; two bytes with the header's length follow
_DIGITS = 20  # room for any number of rows
_ALIGNMENT = 64


class NpyFile:
    """Appends rows; `flush` makes them count.

    The header says how many rows there are; it is written anew, in its place, after the rows that it
    counts. A process that is killed leaves a file that is right as it is, perhaps with bytes behind its
    last row that nobody sees.

    Args:
        path: the file; made anew, unless `rows` is given.
        dtype: of the numbers.
        shape: of a row.
        rows: go on after so many rows of the file; what follows is cut off.

    Raises:
        ValueError: if the file has fewer rows, or other ones.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...], rows: int | None = None):
        self.path = path
        self.rows = rows or 0
        self._dtype = np.dtype(dtype)
        self._shape = tuple(shape)
        head = self._header()
        if rows is not None:
            self._check(rows)
        self._file = path.open("w+b" if rows is None else "r+b")
        self._file.write(head)
        self._file.seek(len(head) + self.rows * self._row_bytes)
        self._file.truncate()
        self.flush()

    def append(self, array: np.ndarray) -> None:
        """Writes rows to the end; `array` has the file's dtype and row shape."""
        assert array.dtype == self._dtype
        assert array.shape[1:] == self._shape
        if array.nbytes:  # an array without bytes has no buffer to write
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.rows += len(array)

    def flush(self) -> None:
        """Counts what has been written so far."""
        self._file.flush()
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        self._file.seek(end)

    def close(self) -> None:
        """Flushes to the disk and closes."""
        self.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def _row_bytes(self):
        return self._dtype.itemsize * int(np.prod(self._shape, dtype=np.int64))

    def _header(self):
        """Equally long for every number of rows."""
        shape = ", ".join(map(str, (self.rows, *self._shape))) + ("," if not self._shape else "")
        dtype = np.lib.format.dtype_to_descr(self._dtype)
        text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': ({shape}), }}"
        start = len(_MAGIC) + 2
        longest = start + len(text) + _DIGITS - len(str(self.rows)) + 1
        length = -(-longest // _ALIGNMENT) * _ALIGNMENT - start
        return _MAGIC + length.to_bytes(2, "little") + text.ljust(length - 1).encode("latin1") + b"\n"

    def _check(self, rows):
        try:
            found = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"`output` must hold what was begun. Received: {self.path}: {error}") from error
        expected = (self._dtype, self._shape)
        if (found.dtype, found.shape[1:]) != expected or len(found) < rows:
            raise ValueError(
                f"`output` must hold what was begun: {self.path} with {rows} rows or more of "
                f"{self._dtype.name} {self._shape}. "
                f"Received: {len(found)} of {found.dtype.name} {found.shape[1:]}."
            )
