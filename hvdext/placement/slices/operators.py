"""The exchanges of cut layers, each with the gradient that belongs to it.

What every rank of the group holds alike is called whole; what differs by rank is a part. The loss is whole,
and so is the gradient of everything whole: each rank has all of it, not a share to be summed.

    operator   forward                        backward
    copy       whole -> whole: nothing        parts -> whole: all-reduce
    reduce     parts -> whole: all-reduce     whole -> whole: nothing
    gather     parts -> whole: all-gather     whole -> part: this rank's part
    split      whole -> part: its part        parts -> whole: all-gather

`copy` and `reduce` are the operators f and g of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).
`copy` stands in front of whatever gives each rank a part; `reduce` sums partial results.

Every rank of `comm` calls each operator, in the same order, and asks for the same gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from hvdext.collectives.differentiable import with_gradient
from hvdext.comm.communicator import Communicator
from hvdext.comm.names import cleaned, numbered
from hvdext.keras_tools.slice_marks import Slice
from hvdext.placement.slices.sample_check import note


def copy(comm: Communicator, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
    """`tensors` as they are; their gradients are summed over the ranks, in one message.

    Args:
        comm: the group.
        tensors: floating, of one dtype; the same on all ranks.
        name: made by `named`.
    """
    if comm.size == 1:
        return list(tensors)

    for i, tensor in enumerate(tensors):
        note(f"{name}.{i}", tensor)

    def backward(gradients):
        return comm.allreduce(gradients, numbered(f"{name}.copy"))

    return with_gradient(lambda values: [tf.identity(value) for value in values], backward, tensors)


def reduce(comm: Communicator, tensor: tf.Tensor, name: str) -> tf.Tensor:
    """The sum of the ranks' tensors.

    Args:
        comm: the group.
        tensor: floating; the same shape on all ranks.
        name: made by `named`.
    """
    if comm.size == 1:
        return tensor
    return with_gradient(
        lambda values: comm.allreduce(values, numbered(f"{name}.reduce")),
        lambda gradients: gradients,
        [tensor],
    )[0]


def gather(comm: Communicator, tensor: tf.Tensor, axis: int, name: str) -> tf.Tensor:
    """The ranks' tensors side by side along `axis`, in rank order.

    Args:
        comm: the group.
        tensor: the same shape on all ranks.
        axis: may count from the end; its length must be static.
        name: made by `named`.
    """
    if comm.size == 1:
        return tensor
    own = Slice(axis % tensor.shape.rank, comm.rank, comm.size)
    return with_gradient(
        lambda values: [joined(comm, values[0], own.axis, numbered(f"{name}.gather"))],
        lambda gradients: [own.of(gradients[0])],
        [tensor],
    )[0]


def split(comm: Communicator, tensor: tf.Tensor, axis: int, name: str) -> tf.Tensor:
    """This rank's part of `tensor` along `axis`.

    Args:
        comm: the group, whose size divides the axis.
        tensor: the same on all ranks.
        axis: may count from the end; its length must be static.
        name: made by `named`.
    """
    if comm.size == 1:
        return tensor
    note(name, tensor)
    own = Slice(axis % tensor.shape.rank, comm.rank, comm.size)
    return with_gradient(
        lambda values: [own.of(values[0])],
        lambda gradients: [joined(comm, gradients[0], own.axis, numbered(f"{name}.split"))],
        [tensor],
    )[0]


def joined(comm: Communicator, tensor: tf.Tensor, axis: int, name: str) -> tf.Tensor:
    """The ranks' tensors side by side along `axis`, without a gradient.

    Args:
        comm: the group.
        tensor: the same shape on all ranks.
        axis: from 0.
        name: the collective's name.
    """
    shape = tensor.shape
    # The engine puts tensors one after the other along axis 0: a new one, which then goes where it belongs.
    ranks = comm.allgather(tensor[tf.newaxis], name)
    moved = tf.transpose(ranks, [*range(1, axis + 1), 0, *range(axis + 1, shape.rank + 1)])
    dynamic = tf.unstack(tf.shape(tensor))
    dynamic[axis] = shape[axis] * comm.size
    result = tf.reshape(moved, dynamic)
    result.set_shape([n * comm.size if i == axis else n for i, n in enumerate(shape)])
    return result


def named(path: str) -> str:
    """The first part of the names of a layer's collectives: `hvdext.slices.<path>`."""
    return f"hvdext.slices.{cleaned(path)}"
