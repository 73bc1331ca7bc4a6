"""Vectors that travel encoded and are combined in numbers of more bits, by ranks that only move the codes.

1. Each rank cuts its vector into as many shards as there are ranks (`shards_of`), encodes them and sends
   shard r to rank r (`scatter_shards`).
2. Rank r decodes what it gets, combines it (a sum, a weighted mean) and encodes the result.
3. All gather the results and decode them (`gather_shards`).

A rank sends 2(n-1)/n of the encoded vector, as a ring would, and nothing is summed in the code's few bits.
Two ranks give each other their whole vector instead: that is as many bytes, in one message and encoded once.
Either way all ranks decode the same codes, and hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from hvdext.comm.communicator import Communicator


def shard_length(ranks: int, length: int, block: int = 1) -> int:
    """How many values each of `ranks` equal shards of whole blocks has, which together hold `length`."""
    return -(-length // (ranks * block)) * block


def shards_of(vector: tf.Tensor, ranks: int, block: int = 1) -> tf.Tensor:
    """Shards of `vector`, one for each rank; for two ranks the whole as a single one.

    Args:
        vector: of static shape (length,).
        ranks: how many there are.
        block: how many values are encoded together.

    Returns:
        Shape (ranks, shard length), filled up with zeros, or (1, length).
    """
    if ranks == 2:
        return vector[tf.newaxis]
    length = vector.shape[0]
    shard = shard_length(ranks, length, block)
    return tf.reshape(tf.pad(vector, [[0, shard * ranks - length]]), [ranks, shard])


def scatter_shards(comm: Communicator, codes: tf.Tensor, name: str, step: str) -> tf.Tensor:
    """Sends the code of shard r to rank r, or that of the whole vector to both ranks.

    Every rank of `comm` must call it.

    Args:
        comm: the ranks.
        codes: one row for each shard from `shards_of`, of one static length.
        name: of the exchange.
        step: part of the collective's name with more than two ranks.

    Returns:
        A row of each rank, in rank order.
    """
    if comm.size == 2:
        rows = comm.allgather(codes, name)
    else:
        rows = comm.alltoall(codes, [1] * comm.size, f"{name}.{step}")
    return tf.ensure_shape(rows, [comm.size, codes.shape[1]])


def gather_shards(
    comm: Communicator,
    combined: tf.Tensor,
    encode: Callable[[tf.Tensor], tf.Tensor],
    decode: Callable[[tf.Tensor], tf.Tensor],
    name: str,
) -> tf.Tensor:
    """Gives every rank what the others have made of their shards; two ranks have all of it already.

    Every rank of `comm` must call it.

    Args:
        comm: the ranks.
        combined: what this rank has made of the rows from `scatter_shards`, one vector.
        encode: makes its code, a vector.
        decode: makes rows of values of rows of codes.
        name: the collective's name.

    Returns:
        The combined vectors of all shards, one behind the other: as long as the vector that was cut, or
        longer by what it was filled up with.
    """
    if comm.size == 2:
        return combined
    return tf.reshape(decode(comm.allgather(encode(combined)[tf.newaxis], name)), [-1])
