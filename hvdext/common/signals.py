"""What a process does when it is asked to end by a signal: `GracefulStop` and `FinalMessage`.

With `GracefulStop`, SIGINT and SIGTERM ask the training to end at its own time. With `FinalMessage`, SIGTERM
ends the process as usual, after it has said how far its work has come.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop:
    """While installed, the first signal only sets `requested`; a second one has its usual effect.

    Python lets the main thread alone handle signals: in another one, installing does nothing.

    Args:
        notice: what the first signal prints on standard error.

    Attributes:
        requested: whether a signal has come since `install`; may be set by hand.
    """

    def __init__(self, notice: str):
        self.requested = False
        self._notice = notice
        self._usual: dict[int, object] = {}
        self._trainer = 0

    def install(self) -> None:
        """Begins to handle signals, as long as the function that called the running hook has not ended."""
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            return
        self._trainer = id(_trainer(sys._getframe(1)))
        for number in SIGNALS:
            self._usual[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Gives the signals their usual effect back; safe to call twice."""
        for number, usual in self._usual.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if usual is None else usual)  # type: ignore[arg-type]
        self._usual = {}

    def _handle(self, number, frame):
        if self.requested or not self._is_training(frame):
            self.uninstall()
            signal.raise_signal(number)
            return
        self.requested = True
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"{signal.Signals(number).name}: {self._notice}\n".encode())

    def _is_training(self, frame: FrameType | None) -> bool:
        """False if `fit` has died of an error, after which Keras calls no hook that could uninstall."""
        while frame is not None and id(frame) != self._trainer:
            frame = frame.f_back
        return frame is not None


def _trainer(frame: FrameType | None) -> FrameType | None:
    """The first frame that is not one of a callback's hooks: `fit`, or a custom loop."""
    while frame is not None and frame.f_code.co_name.startswith("on_"):
        frame = frame.f_back
    return frame


class FinalMessage:
    """Context in which SIGTERM first makes this process say how far it has come, once; then it ends.

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

    def __enter__(self) -> FinalMessage:
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
