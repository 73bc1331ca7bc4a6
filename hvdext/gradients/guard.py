"""Do ranks that train together still hold the same? Looked at within the training step, before an update.

Equal gradients keep equal weights equal, and nothing else: after a forgotten broadcast, with weights that one
rank has loaded or a learning rate that one rank's callback has changed, ranks stay apart for ever, and nobody
sees it. Each rank adds up the bits of every variable, and the sums, four bytes for each, are gathered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.guards import guards_of
from hvdext.gradients.exchange import GradientExchange

_BITS = {1: tf.int8, 2: tf.int16}
# Without quotes, which TensorFlow would escape.
_WHY = (
    "The ranks do not hold the same before this update: they would train different models without a word. "
    "Did one rank load weights or the state of an optimizer, or change a learning rate? "
    "Let all do so, or put hvd.callbacks.BroadcastGlobalVariablesCallback(0) first. What may differ belongs "
    "into register_local_var; with on_divergence=broadcast in hvd.init the values of the first rank count. "
    "The first difference:"
)


class Guard:
    """Counts the updates of one optimizer and compares the ranks at the first of a training and now and then.

    Args:
        exchange: what combines the gradients of these updates.
    """

    def __init__(self, exchange: GradientExchange):
        self._exchange = exchange
        with tf.init_scope(), tf.device("/CPU:0"):
            self._updates = tf.Variable(0, dtype=tf.int64, trainable=False, name="updates")

    def look_next(self) -> None:
        """Before the next update, whatever the last look was: a training or an epoch begins."""
        self._updates.assign(0)

    def look(self, comm: Communicator, held: Callable[[], Sequence[tuple[str, Any]]]) -> tf.Tensor:
        """Compares the ranks if it is time to; what follows an update waits for what is returned.

        Args:
            comm: who trains together; all of them call it for the same updates.
            held: returns the variables that must be the same, with names; asked when it is time.
        """
        guards = guards_of(comm)
        if comm.size == 1 or not guards.check_every:
            return tf.constant(True)
        update = self._updates.assign_add(1) - 1
        return tf.cond(
            tf.equal(update % guards.check_every, 0),
            lambda: self._compare(comm, held(), guards.on_divergence),
            lambda: tf.constant(True),
        )

    def _compare(self, comm, held, on_divergence):
        names, variables = zip(*held, strict=True)
        mine = tf.stack([_sum_of_bits(variable) for variable in variables])
        everyone = comm.allgather(mine[tf.newaxis], f"hvdext.guard.{self._exchange.name}.bits")
        everyone = tf.ensure_shape(everyone, [comm.size, len(variables)])
        differs = tf.reduce_any(everyone != everyone[0], 0)
        first = tf.argmax(tf.cast(differs, tf.int32))
        told = [
            tf.gather(tf.constant(names), first),
            "is not what the first rank has, on ranks",
            tf.boolean_mask(tf.constant(comm.ranks), everyone[:, first] != everyone[0, first]),
        ]
        if on_divergence == "raise":
            tf.debugging.Assert(~tf.reduce_any(differs), [_WHY, *told], summarize=comm.size)
            return tf.constant(True)
        return tf.cond(
            tf.reduce_any(differs), lambda: self._take_over(comm, variables, told), lambda: tf.constant(True)
        )

    def _take_over(self, comm, variables, told):
        if comm.rank == 0:
            tf.print("hvdext: all ranks go on with the values of the first:", *told, output_stream=sys.stderr)
        mine = list(map(tf.convert_to_tensor, variables))
        values = comm.broadcast(mine, 0, f"hvdext.guard.{self._exchange.name}.values")
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return tf.constant(True)


def _sum_of_bits(variable):
    """The sum of a variable's bits, taken for integers, without what does not fit into 32 bits."""
    value = tf.convert_to_tensor(variable)
    if value.dtype.size >= 4:
        return tf.reduce_sum(tf.bitcast(value, tf.int32))
    if value.dtype.is_floating:
        value = tf.bitcast(value, _BITS[value.dtype.size])
    return tf.reduce_sum(tf.cast(value, tf.int32))
