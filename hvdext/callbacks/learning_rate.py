"""Learning rates that follow the epochs, and what a change of them does to momentum."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from hvdext.comm import agreement
from hvdext.comm.current import current
from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import is_number
from hvdext.gradients.apply_hook import hook_of
from hvdext.keras_tools.optimizers import (
    innermost,
    keeps_velocity,
    learning_rate_of,
    updaters_of,
    velocities_of,
)


class LearningRateScheduleCallback(keras.callbacks.Callback):
    """Sets the learning rate to `initial_lr * multiplier(epoch)` from `start_epoch` until `end_epoch`.

    Several of them may follow each other, each in charge of its own epochs. `logs["lr"]` holds the rate at
    each epoch's end.

    With momentum correction the velocity that `SGD` and `RMSprop` keep is rescaled by `new rate / old rate`
    whenever the rate changes, before the step that uses it (Goyal et al. 2017, "Accurate, Large Minibatch
    SGD", arXiv:1706.02677, section 2.1, remark 3): the velocity is a sum of gradients times the rate of their
    time. For one step that is the same as a momentum of `momentum * new / old`; the optimizer's own
    `momentum` stays what it is. Optimizers whose state does not contain the rate (Adam and others) need no
    correction and get none.

    Args:
        initial_lr: the rate that is multiplied.
        multiplier: a function of the epoch, or a number m for the decay `m ** (epoch - start_epoch)`.
        start_epoch: the first epoch, counted from 0, that it is in charge of.
        end_epoch: the first epoch it is not in charge of any more; None: to the end.
        staircase: True: the rate changes at the first batch of an epoch, and `multiplier` gets a whole
            number. False: at every batch, and it gets `epoch + batch / steps_per_epoch`.
        momentum_correction: whether the velocity is rescaled.
        steps_per_epoch: batches per epoch, needed for `staircase=False` where Keras does not know them;
            default: what Keras knows, the largest number of any rank.

    Raises:
        ValueError: if an argument breaks its rule; when training begins, on every rank alike: if the ranks
            have different settings, the optimizer's rate cannot be set, or `steps_per_epoch` is missing.
    """

    @suggests_keywords
    def __init__(
        self,
        initial_lr: float,
        multiplier: float | Callable[[float], float],
        start_epoch: float = 0,
        end_epoch: float | None = None,
        staircase: bool = True,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
    ):
        super().__init__()
        self.initial_lr = _number("initial_lr", initial_lr)
        self.multiplier = _function(multiplier, start_epoch)
        self.start_epoch = start_epoch
        self.end_epoch = end_epoch
        self.staircase = staircase
        self.momentum_correction = momentum_correction
        self.steps_per_epoch = steps_per_epoch
        _check_epochs(start_epoch, end_epoch)
        if steps_per_epoch is not None and (not _is_number(steps_per_epoch) or steps_per_epoch <= 0):
            raise ValueError(
                "`steps_per_epoch` must be a positive number or None. "
                f"Received: steps_per_epoch={steps_per_epoch!r}."
            )
        self._steps = 0.0
        self._epoch = 0

    def on_train_begin(self, logs=None):
        comm = current()
        subject = f"hvd.callbacks.{type(self).__name__}"
        agreement.check(comm, subject, self._settings(), _optimizer_problem(self.model.optimizer))
        batches = comm.allgather_object((self.params or {}).get("steps"), "hvdext.schedule.batches")
        if not self.staircase and self.steps_per_epoch is None and None in batches:
            raise ValueError(
                f"`steps_per_epoch` must be given to {subject}, since Keras does not know the number of "
                f"batches. Received: steps_per_epoch=None, and {batches} batches on the ranks."
            )
        known = [number for number in batches if number is not None]
        self._steps = float(self.steps_per_epoch or max(known, default=0))
        self._check_uneven_batches(batches)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        ended = self.end_epoch is not None and self._epoch >= self.end_epoch
        if self._epoch < self.start_epoch or ended:
            return
        if not self.staircase:
            self._set(self._epoch + batch / self._steps)
        elif batch == 0:
            self._set(self._epoch)

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs["lr"] = _value(self._optimizer().learning_rate)

    def _set(self, epoch):
        optimizer = self._optimizer()
        old = _value(optimizer.learning_rate)
        optimizer.learning_rate = self.initial_lr * self.multiplier(epoch)
        new = _value(optimizer.learning_rate)
        # A velocity that was gathered at rate 0 has nothing to rescale.
        if self.momentum_correction and new != old and old != 0:
            rescale_velocity(optimizer, new / old)

    def _optimizer(self):
        return innermost(self.model.optimizer)

    def _settings(self):
        names = ("initial_lr", "start_epoch", "end_epoch", "staircase", "momentum_correction")
        return {name: getattr(self, name) for name in (*names, "steps_per_epoch")}

    def _check_uneven_batches(self, batches):
        """Refuses a correction that ranks without a batch would miss: their velocities would go astray."""
        hook = hook_of(self.model.optimizer)
        if hook is None or not hook.expects_uneven_batches or not self._corrects():
            return
        alike = None not in batches and min(batches) > 0 and (self.staircase or len(set(batches)) == 1)
        if not alike:
            raise ValueError(
                "`momentum_correction` must be False where ranks may run out of batches before the rate "
                "changes (UnevenBatches): a rank without a batch cannot take part in it. Received: "
                f"momentum_correction=True, staircase={self.staircase} and {batches} batches on the ranks."
            )

    def _corrects(self):
        optimizer = self._optimizer()
        return self.momentum_correction and keeps_velocity(optimizer) and bool(optimizer.momentum)


class LearningRateWarmupCallback(LearningRateScheduleCallback):
    """Raises the learning rate from `initial_lr / hvd.size()` to `initial_lr` over the first epochs.

    The rate grows with every batch: `initial_lr / size * (1 + (size - 1) * e / warmup_epochs)`, where e is
    the part of the epochs that is done once the batch is, so that the warm-up's last batch has `initial_lr`
    exactly (Goyal et al. 2017, "Accurate, Large Minibatch SGD", arXiv:1706.02677, section 2.2).

    Args:
        initial_lr: the rate at the end, usually that of one process times `hvd.size()`.
        warmup_epochs: how many epochs it takes; above 0.
        momentum_correction: as in `LearningRateScheduleCallback`.
        steps_per_epoch: batches per epoch; default: what Keras knows.
        verbose: 1: rank 0 prints a line at the end of the warm-up.

    Raises:
        ValueError: as in `LearningRateScheduleCallback`.
    """

    @suggests_keywords
    def __init__(
        self,
        initial_lr: float,
        warmup_epochs: float = 5,
        momentum_correction: bool = True,
        steps_per_epoch: int | None = None,
        verbose: int = 0,
    ):
        if not _is_number(warmup_epochs) or not warmup_epochs > 0:
            raise ValueError(
                f"`warmup_epochs` must be a positive number. Received: warmup_epochs={warmup_epochs!r}."
            )
        super().__init__(
            initial_lr,
            self._warm,
            end_epoch=warmup_epochs,
            staircase=False,
            momentum_correction=momentum_correction,
            steps_per_epoch=steps_per_epoch,
        )
        self.warmup_epochs = warmup_epochs
        self.verbose = verbose

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.verbose and current().rank == 0 and epoch + 1 == math.ceil(self.warmup_epochs):
            rate = _value(self._optimizer().learning_rate)
            print(f"\nEpoch {epoch + 1}: the warm-up has ended, the learning rate is {rate:g}.")

    def _warm(self, epoch):
        done = min(1.0, (epoch + 1 / self._steps) / self.warmup_epochs)
        size = current().size
        return (1 + (size - 1) * done) / size


def rescale_velocity(optimizer: keras.optimizers.Optimizer, factor: float) -> None:
    """Multiplies what `optimizer` keeps of earlier updates by `factor`; does nothing where it keeps none.

    Args:
        optimizer: `SGD` or `RMSprop`, with momentum; others, and Keras' Muon, keep gradients without rate.
        factor: new learning rate / old learning rate.
    """
    velocities = velocities_of(optimizer)
    if velocities:
        _multiply(velocities, tf.constant(factor, tf.float64))


@functools.partial(tf.function, autograph=False, reduce_retracing=True)
def _multiply(variables: Sequence[tf.Variable], factor: tf.Tensor) -> None:
    for variable in variables:
        variable.assign(variable * tf.cast(factor, variable.dtype))


def _value(rate):
    return float(rate.numpy())


def _optimizer_problem(optimizer):
    inner = innermost(optimizer)
    if updaters_of(inner) != [inner]:
        return (
            "`optimizer` must have one learning rate. Received: a MultiOptimizer; change its members' rates "
            "in a callback of your own."
        )
    if not isinstance(inner.learning_rate, keras.Variable):
        return (
            "`learning_rate` of the optimizer must be a number for a callback to change it. Received: "
            f"{type(inner).__name__} with learning_rate={learning_rate_of(inner).__class__.__name__}."
        )
    return None


def _is_number(value):
    return is_number(value) and math.isfinite(value)


def _number(name, value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}.")
    return number


def _function(multiplier, start_epoch):
    if callable(multiplier):
        return multiplier
    if not _is_number(multiplier):
        raise ValueError(
            f"`multiplier` must be a number or a function of the epoch. Received: multiplier={multiplier!r}."
        )
    return lambda epoch: multiplier ** (epoch - start_epoch)


def _check_epochs(start_epoch, end_epoch):
    if not _is_number(start_epoch) or start_epoch < 0:
        raise ValueError(
            f"`start_epoch` must be a number of at least 0. Received: start_epoch={start_epoch!r}."
        )
    if end_epoch is not None and (not _is_number(end_epoch) or end_epoch <= start_epoch):
        raise ValueError(
            "`end_epoch` must be a number above `start_epoch`, or None. "
            f"Received: start_epoch={start_epoch!r}, end_epoch={end_epoch!r}."
        )
