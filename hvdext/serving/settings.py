"""What a server may be told, complete and checked before anything starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hvdext.common.checks import is_whole, require_choice, require_number, require_whole

MODES = ("replicas", "pipeline")
MIXES = ("auto", "always", "never")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the ranks serve.

    Attributes:
        mode: "replicas": each rank has the whole model; "pipeline": its stages are spread over the ranks.
        size: ranks.
        max_batch_size: rows that go to the model together at most.
        max_delay: seconds that a request may wait for others to join it.
        batch_sizes: the sizes that batches are filled up to; empty: any size up to `max_batch_size`.
        mix_requests: whether rows of several requests are computed together: "auto", where a row's answer
            does not depend on the others; "always"; or "never".
        max_queue: requests that may wait.
        max_queue_bytes: bytes that their inputs may have together.
        timeout: seconds that a request may take.
        batch_timeout: seconds that a rank may take for a batch, before it is killed and started again.
        load_timeout: seconds that loading a model may take.
    """

    mode: str = "replicas"
    size: int = 1
    max_batch_size: int = 32
    max_delay: float = 0.002
    batch_sizes: tuple[int, ...] = ()
    mix_requests: str = "auto"
    max_queue: int = 1000
    max_queue_bytes: int = 512 << 20
    timeout: float = 30.0
    batch_timeout: float = 60.0
    load_timeout: float = 600.0

    def __post_init__(self):
        require_choice("mode", self.mode, MODES)
        require_choice("mix_requests", self.mix_requests, MIXES)
        for name in ("size", "max_batch_size", "max_queue", "max_queue_bytes"):
            self._keep(name, require_whole(name, getattr(self, name), 1))
        delay = require_number("max_delay", self.max_delay, _is_delay, "be 0 seconds or more")
        self._keep("max_delay", delay)
        for name in ("timeout", "batch_timeout", "load_timeout"):
            value = require_number(name, getattr(self, name), _is_span, "be more than 0 seconds")
            self._keep(name, value)
        sizes = self.batch_sizes
        rising = all(is_whole(size, 1) for size in sizes) and list(sizes) == sorted(set(sizes))
        _require(rising, "batch_sizes", sizes, "be whole numbers, 1 or more, each larger than the last")
        self._keep("batch_sizes", tuple(map(int, sizes)))
        _require(
            not sizes or sizes[-1] == self.max_batch_size,
            "batch_sizes",
            sizes,
            f"end with max_batch_size, {self.max_batch_size}",
        )
        pipeline = self.mode == "pipeline"
        _require(not pipeline or self.size >= 2, "mode", self.mode, "have 2 ranks or more for a pipeline")

    def why_alone(self, found: str) -> str:
        """Why a request's rows are computed without others', where trying the model has found `found`."""
        return {"auto": found, "always": "", "never": "mix_requests is 'never'"}[self.mix_requests]

    def _keep(self, name: str, value: Any) -> None:
        """Python's own number instead of NumPy's."""
        object.__setattr__(self, name, value)


def _is_delay(seconds):
    return 0 <= seconds < math.inf


def _is_span(seconds):
    return 0 < seconds < math.inf


def _require(ok, name, value, rule):
    if not ok:
        raise ValueError(f"`{name}` must {rule}. Received: {name}={value!r}.")
