"""Which errors mean that a rank was lost."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import tensorflow as tf

# What the ranks disagree about, they would disagree about again.
_MISTAKES = (tf.errors.FailedPreconditionError, tf.errors.InvalidArgumentError)
_FROM_ENGINE = re.compile(r"Horovod|hvdext\.")


def is_lost_rank(error: BaseException) -> bool:
    """True if `error`, or what it was raised from, is a collective that failed with its peers.

    Not so for errors that say the ranks' tensors do not fit together: those are mistakes in the program,
    come on all ranks alike, and would come again.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, tf.errors.OpError) and _is_failure(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _is_failure(error: tf.errors.OpError) -> bool:
    return not isinstance(error, _MISTAKES) and bool(_FROM_ENGINE.search(error.message or ""))


@contextlib.contextmanager
def recoverable() -> Iterator[None]:
    """Turns the errors of a lost rank into the one that makes Horovod's elastic loop restore and go on."""
    try:
        yield
    except Exception as error:
        if not is_lost_rank(error):
            raise
        from horovod.common.exceptions import HorovodInternalError

        raise HorovodInternalError(str(error)) from error
