"""Rate and latency of the last minute, in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np


class Window:
    """The requests that were answered lately.

    Args:
        seconds: how far it looks back.
        most: requests it remembers; with more than that in `seconds` it looks back less far.
        clock: seconds that never go back.
    """

    def __init__(
        self, seconds: float = 60.0, most: int = 20_000, clock: Callable[[], float] = time.monotonic
    ):
        self._seconds = seconds
        self._clock = clock
        self._began = clock()
        self._answered: deque[tuple[float, float, bool]] = deque(maxlen=most)

    def add(self, seconds: float, ok: bool) -> None:
        """Counts one request that took `seconds`."""
        self._answered.append((self._clock(), seconds, ok))

    def summary(self) -> dict[str, Any]:
        """Requests per second, errors, and percentiles in seconds of those without error, if any."""
        now = self._clock()
        while self._answered and self._answered[0][0] < now - self._seconds:
            self._answered.popleft()
        since = max(self._began, now - self._seconds)
        if len(self._answered) == self._answered.maxlen:
            since = self._answered[0][0]
        took = [seconds for _, seconds, ok in self._answered if ok]
        percentiles = np.percentile(took, [50, 95, 99]).tolist() if took else [None] * 3
        return {
            "window": now - since,
            "requests": len(self._answered),
            "errors": len(self._answered) - len(took),
            "rate": len(self._answered) / max(now - since, 1.0),
            **dict(zip(("p50", "p95", "p99"), percentiles, strict=True)),
        }
