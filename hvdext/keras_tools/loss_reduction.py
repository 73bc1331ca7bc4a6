"""What Keras' losses divide by. It is known where they make one number of the losses of many samples.

sum_over_batch_size, mean       by how many losses there are; under a mask, by how many of them count
mean_with_sample_weight         by the sum of the weights, without those that are masked
sum                             by nothing
None                            by nothing: what Keras then differentiates is the sum
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from keras.src.losses import loss as keras_loss
from keras.src.trainers.compile_utils import CompileLoss
from tensorflow.python.eager import record

Listener = Callable[[tf.Tensor, "Reduction"], tf.Tensor]  # (loss, how it was made) -> the loss instead


@dataclass(frozen=True)
class Reduction:
    """How a loss of Keras, or of a class or function that Keras calls, became one number.

    Attributes:
        kind: "plain" (a mean over all), "masked" (over those that a mask leaves), "weighted" (divided by the
            sum of weights), "sum", "own" (the function has made one number itself, nobody knows how), "none"
            (no number was made) or "unreduced" (nor by anything else that `compile` was given).
        count: what a mean was divided by, a scalar; of a plain one the number of losses. None of the others.
    """

    kind: str
    count: tf.Tensor | None = None


def listen_to_losses(otherwise: Callable[[Reduction], None]) -> None:
    """From now on losses are told to who listens (`listening`); the second time, nothing changes.

    Args:
        otherwise: told of losses under a tape that nobody listens to.
    """
    plain = keras_loss.reduce_weighted_values
    if getattr(plain, "is_listened_to", False):
        return

    def reduce(values, sample_weight=None, mask=None, reduction="sum_over_batch_size", dtype=None):
        result = plain(values, sample_weight, mask, reduction, dtype)
        listener = getattr(_now, "listener", None)
        if listener is None and not record.could_possibly_record():
            return result
        made = _reduction(tf.convert_to_tensor(values), sample_weight, mask, reduction)
        if listener is not None:
            return listener(result, made)
        otherwise(made)
        return result

    reduce.is_listened_to = True  # type: ignore[attr-defined]
    keras_loss.reduce_weighted_values = reduce
    _tell_of_totals()


def _tell_of_totals():
    plain = CompileLoss.call

    @functools.wraps(plain)
    def call(self, y_true, y_pred, sample_weight=None):
        total = plain(self, y_true, y_pred, sample_weight)
        listener = getattr(_now, "listener", None)
        is_one_number = total is None or len(total.shape) == 0
        return total if listener is None or is_one_number else listener(total, Reduction("unreduced"))

    CompileLoss.call = call


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """While it lasts, `listener` gets each loss that this thread makes, and says what is to be taken instead.

    Args:
        listener: None: nobody.
    """
    before = getattr(_now, "listener", None)
    _now.listener = listener
    try:
        yield
    finally:
        _now.listener = before


_now: Any = threading.local()


def _reduction(values, sample_weight, mask, reduction) -> Reduction:
    if reduction in (None, "none"):
        return Reduction("none")
    if reduction == "sum":
        return Reduction("sum")
    if values.shape.rank == 0:
        return Reduction("own")
    everything = tf.size(values, tf.int64)
    if reduction == "mean_with_sample_weight":
        weights = keras_loss.apply_mask(_floating(sample_weight), mask, dtype="float32", reduction=reduction)
        return Reduction("weighted", everything if weights is None else tf.reduce_sum(weights))
    if mask is None:
        return Reduction("plain", everything)
    share = tf.reduce_mean(tf.cast(mask, tf.float64))
    return Reduction("masked", tf.cast(everything, tf.float64) * share)


def _floating(weights):
    return None if weights is None else tf.cast(weights, tf.float32)
