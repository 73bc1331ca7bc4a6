"""One progress bar over all ranks: rows, rate, time left."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN_LINES = 15.0  # where the screen is a file or a pipe, which only grows
_SECONDS_BETWEEN_BARS = 0.1
_WIDTH = 24  # of the bar, in characters


class Progress:
    """What rank 0 shows on standard error.

    Args:
        label: what goes on.
        rows: in all; None: not known.
        batches: in all; None: not known.
        verbose: "auto" or 1: a bar on a terminal, a line now and then elsewhere; 2: lines; 0: nothing.
        done: rows and batches of an earlier run.
    """

    def __init__(
        self,
        label: str,
        rows: int | None,
        batches: int | None,
        verbose: str | int,
        done: tuple[int, int] = (0, 0),
    ):
        self._label = label
        self._total_rows = rows
        self._total_batches = batches
        self._begin_rows, self._begin_batches = done
        self._is_shown = verbose != 0
        self._has_bar = self._is_shown and verbose != 2 and sys.stderr.isatty()
        self._start = self._last = time.monotonic()

    def update(self, rows: int, batches: int) -> None:
        """So much is done, with what an earlier run has done."""
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_BARS if self._has_bar else _SECONDS_BETWEEN_LINES
        if not self._is_shown or now - self._last < pause:
            return
        self._last = now
        start, end = ("\r\033[K", "") if self._has_bar else ("", "\n")
        print(start + self.line(rows, batches, now - self._start), end=end, file=sys.stderr, flush=True)

    def finish(self, rows: int) -> None:
        """Says what it has come to."""
        if not self._is_shown:
            return
        seconds = time.monotonic() - self._start
        new = rows - self._begin_rows
        before = f", {self._begin_rows:,} before" if self._begin_rows else ""
        start = "\r\033[K" if self._has_bar else ""
        text = f"{self._label}: {new:,} rows in {duration(seconds)}, {new / max(seconds, 1e-9):,.0f} rows/s"
        print(start + text + before, file=sys.stderr, flush=True)

    def line(self, rows: int, batches: int, seconds: float) -> str:
        """What is shown after so many seconds."""
        total = "" if self._total_rows is None else f"/{self._total_rows:,}"
        rate = (rows - self._begin_rows) / max(seconds, 1e-9)
        text = f"{self._label}: {rows:,}{total} rows"
        if self._total_batches:
            fraction = batches / self._total_batches
            filled = int(_WIDTH * fraction)
            text += f" [{'=' * filled}{' ' * (_WIDTH - filled)}] {fraction:.0%}"
        text += f", {rate:,.0f} rows/s"
        new = batches - self._begin_batches
        if self._total_batches and new:
            left = (self._total_batches - batches) * seconds / new
            text += f", {duration(left)} left"
        return text


def duration(seconds: float) -> str:
    """Such as "4.2 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
