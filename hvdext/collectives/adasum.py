"""Adasum: gradients that agree are averaged, orthogonal ones are added.

Maleki et al. 2020, "Scaling Distributed Training with Adaptive Summation", arXiv:2006.02924. For two ranks,
per layer (section 3, equation 2):

    Adasum(a, b) = (1 - a.b / (2 |a|^2)) a  +  (1 - a.b / (2 |b|^2)) b

and for 2^k ranks a tree over neighbours: Adasum(Adasum(g0, g1), Adasum(g2, g3)), ... Each level is one step
of recursive vector halving (the paper's algorithm 1): partners swap halves of what they hold, all ranks
below one node of the tree add up their parts of the three dot products, and each combines its half. At
the end every rank holds 1/n of the result and all gather it. A rank sends 2(n-1)/n of the gradient's
bytes, as in a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import tensorflow as tf

from hvdext.comm.communicator import Communicator


def adasum(comm: Communicator, tensors: Sequence[tf.Tensor], name: str) -> list[tf.Tensor]:
    """Combines floating tensors over a power-of-two number of ranks, each tensor on its own.

    Args:
        comm: who combines; `comm.size` is a power of two.
        tensors: floating tensors of one dtype and static shapes, the same on every rank.
        name: the collective's name.

    Returns:
        The combined tensors, bit for bit the same on every rank.
    """
    lengths = [tensor.shape.num_elements() for tensor in tensors]
    total = sum(lengths)
    padded = -(-total // comm.size) * comm.size
    flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
    held = tf.pad(flat, [[0, padded - total]])
    bounds = _cumulative(lengths)

    start, length = 0, padded  # which part of the whole vector `held` is
    distance = 1
    while distance < comm.size:
        lower = comm.rank & distance == 0
        length //= 2
        if not lower:
            start += length
        own, theirs = _swap_halves(comm, held, lower, distance, f"{name}.swap{distance}")
        first, second = (own, theirs) if lower else (theirs, own)
        spans = _spans(bounds, start, length)
        partial = _dot_products(first, second, spans, len(lengths))
        dots = _sum_below_node(comm, partial, 2 * distance, f"{name}.dots{distance}")
        held = _combine(first, second, dots, spans, length)
        distance *= 2

    gathered = comm.allgather(held[tf.newaxis], f"{name}.gather")
    # Rank r holds the part whose position is r with its bits reversed.
    order = [_reversed_bits(position, comm.size) for position in range(comm.size)]
    whole = tf.reshape(tf.gather(gathered, order), [padded])[:total]
    parts = tf.split(whole, lengths)
    return [tf.reshape(part, t.shape) for part, t in zip(parts, tensors, strict=True)]


def _swap_halves(comm, held, lower, distance, name):
    """Keeps one half of `held`, sends the other to the partner and returns (kept, received)."""
    half = held.shape[0] // 2
    kept, sent = (held[:half], held[half:]) if lower else (held[half:], held[:half])
    splits = [0] * comm.size
    splits[comm.rank ^ distance] = half
    received = comm.alltoall(sent, splits, name)
    received.set_shape([half])
    return kept, received


def _dot_products(first, second, spans, layers):
    """float64 (layers, 3): a.b, a.a and b.b of each layer, over the part that is held here."""
    first, second = tf.cast(first, tf.float64), tf.cast(second, tf.float64)
    rows = {
        layer: tf.stack([tf.reduce_sum(x[a:b] * y[a:b]) for x, y in pairs])
        for layer, a, b in spans
        for pairs in [[(first, second), (first, first), (second, second)]]
    }
    return tf.stack([rows.get(layer, tf.zeros([3], tf.float64)) for layer in range(layers)])


def _sum_below_node(comm, partial, width, name):
    """Sums over the `width` neighbouring ranks that share a node of the tree, this one among them."""
    node = comm.rank // width * width
    everyone = comm.allgather(partial[tf.newaxis], name)
    return tf.reduce_sum(everyone[node : node + width], axis=0)


def _combine(first, second, dots, spans, length):
    pieces, end = [], 0
    for layer, a, b in spans:
        both, one, two = tf.unstack(dots[layer])
        keep_first = tf.cast(1 - tf.math.divide_no_nan(both, 2 * one), first.dtype)
        keep_second = tf.cast(1 - tf.math.divide_no_nan(both, 2 * two), first.dtype)
        pieces.append(keep_first * first[a:b] + keep_second * second[a:b])
        end = b
    pieces.append(first[end:])  # the padding at the very end
    combined = tf.concat(pieces, 0)
    combined.set_shape([length])
    return combined


def _spans(bounds, start, length):
    """(layer, a, b): where each layer's values stand within the part [start, start + length)."""
    spans = []
    for layer, (low, high) in enumerate(pairwise(bounds)):
        a, b = max(low, start), min(high, start + length)
        if a < b:
            spans.append((layer, a - start, b - start))
    return spans


def _cumulative(lengths):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds


def _reversed_bits(number, size):
    bits = size.bit_length() - 1
    return int(format(number, f"0{bits}b")[::-1], 2) if bits else 0
