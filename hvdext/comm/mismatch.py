"""The error of ranks whose arguments do not fit together."""

from __future__ import annotations

import tensorflow as tf


class MismatchError(ValueError, tf.errors.FailedPreconditionError, tf.errors.InvalidArgumentError):
    """What the ranks of a collective have passed does not fit together; raised on every rank alike.

    It is a `ValueError`, and also what Horovod raises in the same places: `FailedPreconditionError` for
    shapes, dtypes and roots, `InvalidArgumentError` for splits. So scripts written for Horovod catch it.

    Its arguments are those of TensorFlow's errors: AutoGraph and Keras make errors anew, with a longer
    message, where one passes through a function or a layer.
    """

    def __init__(self, node_def, op, message: str, *args):
        tf.errors.OpError.__init__(self, node_def, op, message, tf.errors.FAILED_PRECONDITION, *args)


def mismatch(message: str) -> MismatchError:
    """The error with this message."""
    return MismatchError(None, None, message)
