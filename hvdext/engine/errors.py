"""What goes wrong when the engine is built or looked at."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine cannot be built or installed; the message says what to do about it."""
