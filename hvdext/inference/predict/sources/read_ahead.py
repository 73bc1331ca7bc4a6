"""Batches are loaded while the ones before them are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from hvdext.common.background import Background

T = TypeVar("T")


def read_ahead(
    load: Callable[[int], T], numbers: Sequence[int], workers: int = 1, ahead: int = 1
) -> Iterator[T]:
    """`load(number)` of all numbers, in their order; threads load the next ones while the caller has one.

    Args:
        load: makes a batch.
        numbers: of the batches.
        workers: at most so many threads.
        ahead: batches that are loaded, or being loaded, before the caller asks for them.
    """
    readers = [Background(f"hvdext-reader-{i}") for i in range(min(workers, len(numbers)))]
    upcoming: deque[Future] = deque()
    try:
        for i, number in enumerate(numbers):
            upcoming.append(readers[i % len(readers)].submit(load, number))
            if len(upcoming) > ahead:
                yield upcoming.popleft().result()
        while upcoming:
            yield upcoming.popleft().result()
    finally:
        for future in upcoming:
            future.cancel()
        for reader in readers:
            reader.stop()
