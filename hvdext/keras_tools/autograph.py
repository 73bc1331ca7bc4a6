"""hvdext's own code stays as it is written where a `tf.function` calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import tensorflow as tf

F = TypeVar("F", bound=Callable[..., Any])


def without_autograph(function: F) -> F:
    """Returns `function` such that AutoGraph rewrites neither it nor what it calls.

    AutoGraph turns an `if` or `for` over tensors into TensorFlow's. Those in hvdext are over Python's values:
    settings, lists of variables, the number of ranks; what depends on tensors is written with `tf.cond`.
    There is nothing to gain, and a trace would take longer and its errors would point at generated code.
    """
    return tf.autograph.experimental.do_not_convert(function)
