"""What every kind of data for predictions offers: batches by number, the same on every rank."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdext.inference.predict.rounds import evenly
from hvdext.inference.predict.sources.rows import row_count


class Source(abc.ABC):
    """Batches in their order, each in the form in which Keras hands it to a model's step.

    Attributes:
        batches: how many; None: not known.
        rows: how many; None: not known.
        seen: batches that `share` has gone through to find its own; 0 where it need not look.
        landmarks: fingerprints of batches 0, 1, 3, 7, 15, ..., as far as this rank has come; for sources that
            ranks might go through in different orders.
    """

    batches: int | None = None
    rows: int | None = None
    seen: int = 0
    landmarks: Sequence[str] = ()

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """Batches `start` to `stop` - 1 with their numbers of rows, or as many of them as there are.

        Calls come with growing `start`, and never go back.
        """

    def share(self, rank: int, size: int) -> Iterator[tuple[int, tuple[Any, int]]]:
        """This rank's share of all batches, with the number of each."""
        assert self.batches is not None
        run = evenly(0, self.batches, size)[rank]
        return enumerate(self.read(run.start, run.stop), run.start)

    def ends_at(self, count: int) -> bool:
        """Whether there are `count` batches, neither more nor less; where `batches` does not say it."""
        return self.batches == count

    def end(self) -> None:  # noqa: B027 - most need not do anything
        """Called after the last batch, if nothing has failed."""

    @abc.abstractmethod
    def example(self) -> Any:
        """The first of all batches, before any is read; None if there is none."""

    @abc.abstractmethod
    def spec(self) -> Any:
        """The type of a batch; None if it cannot be known without one."""

    @abc.abstractmethod
    def facts(self) -> dict[str, object]:
        """What all ranks must have alike, and a later run that goes on with this one."""


def order_problem(everyone: Sequence[Sequence[str]]) -> str | None:
    """What is wrong if the ranks' landmarks differ; None if nothing is.

    Args:
        everyone: the landmarks of each rank, in rank order.
    """
    for number, found in enumerate(zip(*everyone, strict=False)):
        if len(set(found)) > 1:
            return (
                f"`x` must give the same batches on all ranks, in the same order; shuffles need a seed. "
                f"Received: different batches {2**number - 1}."
            )
    return None


def rows_in(batch: Any) -> int:
    """The number of rows of a batch, by the first input that it has."""
    x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    return row_count(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))


def fingerprint(tensors: Any) -> str:
    """The beginning of the SHA-256 of all numbers and texts in a structure of tensors."""
    found = hashlib.sha256()
    for tensor in tf.nest.flatten(keras.tree.flatten(tensors), expand_composites=True):
        if tensor is None:
            continue
        array = np.asarray(tensor)
        found.update(f"{array.dtype.name} {array.shape};".encode())
        found.update(repr(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return found.hexdigest()[:16]
