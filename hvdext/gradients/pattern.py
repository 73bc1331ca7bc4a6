"""Do the ranks exchange the same gradients in this step? It is told along with them, in every message.

What a step exchanges can change after the ranks have agreed on it: a branch of the model that the batch of
one rank does not take, a layer that is dropped or frozen. Gradients of one variable would then be added to
those of another. So each message carries `BITS` numbers more, 0 or 1, the digest of who meets whom:

    average: b = (b_0 + ... + b_{n-1}) / n      equal to a rank's own bit only if all ranks have it
    sum:     b = b_0 + ... + b_{n-1}            n times it
    Adasum:  of vectors, all alike: the vector; anything else is none of them (all begin with a 1)

A rank that finds another result ends the step with an error, and so do the others: none has its own bits.
"""

from __future__ import annotations

import hashlib

import numpy as np
import tensorflow as tf

BITS = 32


class Pattern:
    """What one rank exchanges in one step.

    Args:
        facts: what must be alike on all ranks; compared by its `repr`.
        words: what to say of it if it is not.
    """

    def __init__(self, facts: object, words: str):
        digest = hashlib.sha256(repr(facts).encode()).digest()
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))
        self._bits = np.concatenate([[1], bits[: BITS - 1]]).astype(np.float32)
        self._words = words

    def bits(self, dtype: tf.DType) -> tf.Tensor:
        """The numbers that travel with gradients of this type, shape (BITS,)."""
        return tf.constant(self._bits, dtype)

    def checked(self, tensors: list[tf.Tensor], bits: tf.Tensor, copies: int, size: int) -> list[tf.Tensor]:
        """Returns combined `tensors` if all ranks have exchanged the same; otherwise their step fails.

        Args:
            tensors: what came with `bits`.
            bits: the combined bits.
            copies: how many times their own bits that are, if all are alike: 1, or the number of ranks.
            size: the number of ranks.
        """
        apart = tf.abs(tf.cast(tf.math.real(bits), tf.float32) / copies - self._bits)
        alike = tf.reduce_max(apart) < 0.5 / size  # one rank that differs makes 1 / size
        with tf.control_dependencies([tf.debugging.Assert(alike, [self._words], name="same_on_all_ranks")]):
            return [tf.identity(tensor) for tensor in tensors]
