"""One-way transfers between two ranks of a pipeline: any tensors as one message of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf

from hvdext.comm.communicator import Communicator


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before it comes.

    Attributes:
        shape: with None where an axis is not known.
        dtype: such as tf.float32.
    """

    shape: tuple[int | None, ...]
    dtype: tf.DType


def has_header(specs: Sequence[Spec]) -> bool:
    """Whether a message of such tensors begins with their shapes: 8 bytes per axis.

    One tensor of which only the number of rows is open needs none.
    """
    return not (len(specs) == 1 and specs[0].shape[:1] == (None,) and None not in specs[0].shape[1:])


def bytes_of(shapes: Sequence[Sequence[int]], specs: Sequence[Spec]) -> int:
    """The length of a message: its tensors' bytes and, where it has one, its header's.

    Args:
        shapes: of the tensors that travel.
        specs: what was known of them.
    """
    header = 8 * sum(map(len, shapes)) if has_header(specs) else 0
    body = sum(math.prod(shape) * _size(spec.dtype) for shape, spec in zip(shapes, specs, strict=True))
    return header + body


def pack(tensors: Sequence[tf.Tensor], specs: Sequence[Spec]) -> tf.Tensor:
    """The message of `tensors`: uint8, one axis. One tensor without a header is not copied."""
    parts = [_to_bytes(tensor) for tensor in tensors]
    if has_header(specs):
        shapes = tf.concat([tf.shape(tensor, tf.int64) for tensor in tensors], 0)
        parts = [_to_bytes(shapes), *parts]
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def unpack(message: tf.Tensor, specs: Sequence[Spec]) -> list[tf.Tensor]:
    """The tensors that `pack` has made `message` of, under the same `specs`."""
    if not has_header(specs):
        (spec,) = specs
        return [_from_bytes(message, spec, [-1, *spec.shape[1:]])]
    ranks = [len(spec.shape) for spec in specs]
    axes = _from_bytes(message[: 8 * sum(ranks)], Spec((None,), tf.int64), [-1])
    shapes = tf.split(axes, ranks)
    sizes = [tf.reduce_prod(shape) * _size(spec.dtype) for shape, spec in zip(shapes, specs, strict=True)]
    bodies = tf.split(message[8 * sum(ranks) :], tf.stack(sizes), num=len(specs))
    return [_from_bytes(*parts) for parts in zip(bodies, specs, shapes, strict=True)]


class Channel:
    """Sends messages to one other rank and receives messages from it.

    A transfer is an alltoall of the two ranks in which only one has rows to send: the receiver needs to know
    neither shape nor length. Both ranks call it under the same name, and in one common order if they have
    several to make.

    Args:
        pair: the communicator of the two ranks.
    """

    def __init__(self, pair: Communicator):
        self._pair = pair

    def send(self, tensors: Sequence[tf.Tensor], specs: Sequence[Spec], name: str) -> tf.Tensor:
        """Sends `tensors`; the other rank calls `receive` with the same `specs` and `name`.

        Returns:
            A tensor that is there once the message has gone.
        """
        message = pack(tensors, specs)
        length = tf.size(message)
        return self._pair.alltoall(message, self._splits(length), name)

    def receive(self, specs: Sequence[Spec], name: str, after: tf.Tensor) -> list[tf.Tensor]:
        """Returns the tensors that the other rank sends.

        Args:
            specs: what they are.
            name: of the transfer.
            after: nothing is exchanged before this tensor is there. Without it a step that ends for want of
                data would wait for a message that nobody sends.
        """
        with tf.control_dependencies([after]):
            nothing = tf.identity(tf.zeros([0], tf.uint8))
        message = self._pair.alltoall(nothing, self._splits(0), name)
        return unpack(message, specs)

    def _splits(self, length):
        zero = tf.zeros([], tf.int32)
        length = tf.convert_to_tensor(length, tf.int32)
        return tf.stack([zero, length] if self._pair.rank == 0 else [length, zero])


def _size(dtype: tf.DType) -> int:
    return tf.as_dtype(dtype).size


def _to_bytes(tensor):
    if tensor.dtype == tf.bool:
        tensor = tf.cast(tensor, tf.uint8)
    return tf.reshape(tf.bitcast(tensor, tf.uint8), [-1])


def _from_bytes(message, spec, shape):
    size = _size(spec.dtype)
    last = [] if size == 1 else [size]
    bytes_ = tf.reshape(message, tf.concat([tf.cast(shape, tf.int64), tf.constant(last, tf.int64)], 0))
    tensor = tf.cast(bytes_, tf.bool) if spec.dtype == tf.bool else tf.bitcast(bytes_, spec.dtype)
    return tf.ensure_shape(tensor, spec.shape)
