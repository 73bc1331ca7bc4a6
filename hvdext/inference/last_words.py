"""What a rank says before a launcher ends it, because another rank is gone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


class LastWords:
    """Context in which SIGTERM first makes this process say how far it has come; once.

    A launcher ends all ranks within milliseconds after the first one has failed, often before Python has
    printed the error of that. Python lets the main thread alone handle signals: in another one, only `say`
    speaks.

    Args:
        words: what to say.
    """

    def __init__(self, words: Callable[[], str]):
        self._words = words
        self._has_spoken = False
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> LastWords:
        if self._is_main:
            self._usual = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exc_info) -> None:
        if self._is_main and signal.getsignal(signal.SIGTERM) == self._handle:
            self._restore()

    def say(self, text: str) -> None:
        """Writes `text` to standard error, unless this process has had its last words."""
        if not self._has_spoken:
            self._has_spoken = True
            os.write(2, f"\nhvdext: {text}\n".encode())  # not print(): a signal may come in the middle of one

    def _handle(self, number, frame):
        self.say(self._words())
        self._restore()
        signal.raise_signal(number)

    def _restore(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._usual is None else self._usual)
