"""How a vector travels: as float32, or in fewer bytes.

A vector is cut into blocks. A block in few bits needs a scale of its own: one outlier then coarsens its block
and not the whole model.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import tensorflow as tf

from hvdext.common.arguments import suggests_keywords
from hvdext.common.checks import require_choice

_ROUNDINGS = ("stochastic", "error_feedback")
_SMALLEST = 2.0**-126  # below it TensorFlow may take a float32 for zero, or not: that depends on the thread


@suggests_keywords
@dataclass(frozen=True)
class Wire:
    """The bytes that stand for a float32 vector between ranks.

    | format | bytes per value | largest error of a value x |
    |---|---|---|
    | float32 | 4 | none |
    | bfloat16 | 2 | abs(x) / 256; beyond 3.39e38 it becomes infinite |
    | float16 | 2.016 | abs(x) / 2048, or a / 2**39 if that is more |
    | int8 | 1.031 | a / 127 stochastic, a / 254 with error feedback |
    | int4 | 0.531 | a / 7 stochastic, a / 14 with error feedback |

    a is the largest magnitude in the block of x: 256 values of float16 (which a power of two per block keeps
    in range), 128 of int8 and int4. Bounds hold up to float32's own rounding. Finite values are expected.
    Float32's denormals, below 1.2e-38, may become zero, as may whole blocks of int8 below 1.5e-36 and of
    int4 below 8.3e-38.

    Block-wise scales: Dettmers et al. 2021, arXiv:2110.02861. Stochastic rounding: QSGD, Alistarh et al.
    2017, arXiv:1610.02132.

    Args:
        format: "float32", "float16", "bfloat16", "int8" or "int4".
        rounding: for int8 and int4. "stochastic": up or down at random, so that the expected value is right,
            to 1/512 of a step. "error_feedback": to the nearest; what is cut off is added to the
            values of the next turn, which whoever encodes has to do.

    Raises:
        ValueError: if an argument is none of these, or error feedback is asked of a float format.
    """

    format: str
    rounding: str = "stochastic"

    def __post_init__(self):
        format, rounding = self.format, self.rounding
        require_choice("wire", format, tuple(_FORMATS), _SHORT)
        require_choice("rounding", rounding, _ROUNDINGS)
        if rounding == "error_feedback" and not isinstance(_FORMATS[format], _Integers):
            raise ValueError(
                "`rounding` 'error_feedback' needs the format 'int8' or 'int4'. "
                f"Received: rounding='error_feedback' with format={format!r}."
            )

    @property
    def block(self) -> int:
        """How many values are encoded together."""
        return _FORMATS[self.format].block

    def encoded_bytes(self, n: int) -> int:
        """How many bytes `n` values take; a last block that is not full takes as many as a full one."""
        return _blocks(n, self.block) * _FORMATS[self.format].block_bytes

    def encode(self, values: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Returns `values` as bytes.

        Args:
            values: float32 of shape (n,) or (k, n), n static; finite.
            seed: int32 of shape (2,), for stochastic rounding; the same seed gives the same bytes.

        Returns:
            uint8 of shape (encoded_bytes(n),) or (k, encoded_bytes(n)).
        """
        n = values.shape[-1]
        blocks = _blocks(n, self.block)
        padding = blocks * self.block - n
        if padding:
            values = tf.pad(values, [[0, 0]] * (values.shape.rank - 1) + [[0, padding]])
        cut = tf.reshape(values, [-1, blocks, self.block])
        noise = _noise(tf.shape(cut), seed) if self._is_random else None
        return _with_leading(_FORMATS[self.format].encode(cut, noise), values, self.encoded_bytes(n))

    def decode(self, data: tf.Tensor, n: int) -> tf.Tensor:
        """Returns the values that `encode` has made `data` of.

        Args:
            data: uint8 of shape (encoded_bytes(n),) or (k, encoded_bytes(n)).
            n: how many values, static.

        Returns:
            float32 of shape (n,) or (k, n).
        """
        blocks = _blocks(n, self.block)
        rows = tf.reshape(data, [-1, self.encoded_bytes(n)])
        values = _FORMATS[self.format].decode(rows, blocks)
        return _with_leading(tf.reshape(values, [-1, blocks * self.block])[:, :n], data, n)

    @property
    def _is_random(self):
        return isinstance(_FORMATS[self.format], _Integers) and self.rounding == "stochastic"


_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def wire_of(value: str | Wire) -> Wire:
    """A `Wire`, or the one with this format and the default rounding.

    Raises:
        ValueError: if it is neither; a misspelt format gets the nearest one.
    """
    return value if isinstance(value, Wire) else Wire(value)


# -- formats: blocks of values, shape (k, blocks, block), to rows of bytes and back -----------------------


class _Format(abc.ABC):
    block: int
    block_bytes: int

    @abc.abstractmethod
    def encode(self, values: tf.Tensor, noise: tf.Tensor | None) -> tf.Tensor:
        """Float32 (k, blocks, block) to bytes; `noise` lies between 0 and 1 and has the values' shape."""

    @abc.abstractmethod
    def decode(self, rows: tf.Tensor, blocks: int) -> tf.Tensor:
        """Bytes (k, blocks * block_bytes) to float32 (k, blocks, block)."""


class _Plain(_Format):
    """The bits of a type as they are."""

    block = 1

    def __init__(self, dtype: tf.DType):
        self._dtype = dtype
        self.block_bytes = dtype.size

    def encode(self, values, noise):
        return tf.bitcast(tf.cast(values, self._dtype), tf.uint8)

    def decode(self, rows, blocks):
        return tf.cast(_numbers(rows, [blocks, 1], self._dtype), tf.float32)


class _ScaledHalf(_Format):
    """Float16 with the block's largest value brought to between 2**14 and 2**15."""

    block = 256
    block_bytes = 2 * 256 + 4

    def encode(self, values, noise):
        # The exponent alone: multiplying by a power of two is exact. Its floor keeps the factor finite.
        bits = tf.bitcast(_absmax(values), tf.int32)
        power = tf.bitcast(tf.bitwise.bitwise_and(bits, 0x7F800000), tf.float32)
        scale = tf.maximum(power, 2.0**-110) * 2.0**-14
        halves = tf.cast(values * tf.math.reciprocal(scale), tf.float16)
        return _joined(tf.bitcast(halves, tf.uint8), scale)

    def decode(self, rows, blocks):
        data, scale = _taken_apart(rows, blocks)
        return tf.cast(_numbers(data, [blocks, self.block], tf.float16), tf.float32) * scale


class _Integers(_Format):
    """Whole multiples, -levels to levels, of 1/levels of the block's largest magnitude."""

    block = 128

    def __init__(self, levels: int, packed: bool):
        self._levels = levels
        self._packed = packed  # two to a byte
        self.block_bytes = (64 if packed else 128) + 4

    def encode(self, values, noise):
        scale = _absmax(values) * (1 / self._levels)
        scale = tf.where(scale < _SMALLEST, tf.zeros_like(scale), scale)
        steps = values * tf.math.reciprocal_no_nan(scale)
        steps = tf.round(steps) if noise is None else tf.floor(steps + noise)
        if self._packed:
            high, low = steps[..., :64], steps[..., 64:]
            return _joined(tf.cast(16 * high + (low + 136), tf.uint8), scale)  # 136: both from -8 to 0
        return _joined(tf.bitcast(tf.cast(steps, tf.int8), tf.uint8), scale)

    def decode(self, rows, blocks):
        data, scale = _taken_apart(rows, blocks)
        if self._packed:
            data = tf.reshape(data, [-1, blocks, 64])
            both = [tf.bitwise.right_shift(data, _byte(4)), tf.bitwise.bitwise_and(data, _byte(15))]
            data = tf.concat(both, -1) - _byte(8)
        steps = tf.reshape(tf.bitcast(data, tf.int8), [-1, blocks, self.block])
        return tf.cast(steps, tf.float32) * scale


_FORMATS: dict[str, _Format] = {
    "float32": _Plain(tf.float32),
    "float16": _ScaledHalf(),
    "bfloat16": _Plain(tf.bfloat16),
    "int8": _Integers(127, packed=False),
    "int4": _Integers(7, packed=True),
}


# -- parts of formats -----------------------------------------------------------------------------------


def _blocks(n, block):
    return -(-n // block)


def _absmax(values):
    return tf.reduce_max(tf.abs(values), axis=-1, keepdims=True)


def _noise(shape, seed):
    """Float32 of `shape`, whose last part is a multiple of 4: 1/512, 3/512 ... 511/512.

    One random byte per value: drawing random numbers costs more than all the rest. The largest stays so far
    below 1 that no rounding error carries a block's largest value over its level.
    """
    words = tf.random.stateless_uniform(
        [tf.reduce_prod(shape) // 4], seed, minval=None, maxval=None, dtype=tf.int32
    )
    numbers = tf.cast(tf.reshape(tf.bitcast(words, tf.uint8), shape), tf.float32)
    return numbers * (1 / 256) + 1 / 512


def _joined(data, scale):
    """Rows of bytes: all blocks' `data`, then all their scales."""
    data = tf.reshape(data, [-1, data.shape[1:].num_elements()])
    scales = tf.bitcast(scale, tf.uint8)
    return tf.concat([data, tf.reshape(scales, [-1, scales.shape[1:].num_elements()])], 1)


def _taken_apart(rows, blocks):
    length = rows.shape[1] - 4 * blocks
    return rows[:, :length], _numbers(rows[:, length:], [blocks, 1], tf.float32)


def _numbers(data, shape, dtype):
    """Bytes (k, ...) as numbers of `dtype` and shape (k, *shape)."""
    return tf.bitcast(tf.reshape(data, [-1, *shape, dtype.size]), dtype)


def _with_leading(rows, model, length):
    """`rows`, of shape (k, length), with as many axes as `model` has."""
    return tf.reshape(rows, [length] if model.shape.rank == 1 else [-1, length])


def _byte(value):
    return tf.constant(value, tf.uint8)
