"""What hvdext tells its users: what happens goes to a logger, what they did wrong becomes a warning.

There is one logger, "hvdext", and children of it: "hvdext.data", "hvdext.serve", "hvdext.watchdog". Every
record has the attribute `rank` (None before `hvd.init()`), for formats such as "%(rank)s %(message)s". As
long as the program has not set up logging by itself, warnings and errors go to the standard error.

What a program prints for its user (progress, tables, `hvdext doctor`) is printed. A process that is ending
writes to the standard error directly (`hvdext.common.signals`, `hvdext.comm.watchdog`).
"""

from __future__ import annotations

import logging
import sys
import warnings

ROOT = "hvdext"
_INNER = ("hvdext", "keras", "tensorflow")  # packages between a warning and the user's own line

_rank: int | None = None


def set_rank(rank: int | None) -> None:
    """Makes `rank` the one of all records of this process from now on; None: of no rank."""
    global _rank
    _rank = rank


def logger(name: str) -> logging.Logger:
    """The logger called `hvdext.<name>`, whose records know the rank."""
    _set_up()
    found = logging.getLogger(f"{ROOT}.{name}")
    found.addFilter(_add_rank)  # a filter sees the records of its own logger only; it is added once
    return found


def show(level: int) -> None:
    """Lets records from `level` on through by default, for programs of hvdext's own."""
    _set_up()
    logging.getLogger(ROOT).setLevel(level)
    _default.setLevel(level)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issues a warning that points at the user's line: the first one outside of hvdext, Keras and TensorFlow.

    Args:
        message: what the user should know.
        category: the class of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class _Default(logging.Handler):
    """Writes to the standard error, unless the program has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        if logging.root.handlers or logging.getLogger(ROOT).handlers != [self]:
            return
        try:
            # Not the stream of the time when this was made: somebody may have replaced it.
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _Format(logging.Formatter):
    """The record's message behind its logger's name and, where there is one, the rank."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """One line."""
        rank = getattr(record, "rank", None)
        who = "" if rank is None else f" rank {rank}:"
        return f"{record.name.replace('.', ' ')}:{who} {record.message}"


def _add_rank(record: logging.LogRecord) -> bool:
    record.rank = _rank
    return True


def _set_up() -> None:
    root = logging.getLogger(ROOT)
    if _default not in root.handlers:
        root.addHandler(_default)
        root.addFilter(_add_rank)


_default = _Default(logging.WARNING)
_default.setFormatter(_Format())
