"""The weighted mean of one flat vector per rank, over all ranks or over a rank and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from hvdext.collectives import encoded
from hvdext.comm.communicator import Communicator
from hvdext.sync.wire import Wire

Errors = Sequence[tf.Tensor]


def mean_over_all(
    comm: Communicator,
    values: tf.Tensor,
    row: tf.Tensor,
    weigh: Callable[[tf.Tensor], tf.Tensor],
    wire: Wire,
    name: str,
    seed: tf.Tensor,
    errors: Errors | None = None,
) -> tuple[tf.Tensor, Errors | None, tf.Tensor]:
    """The ranks' weighted mean, sum of w_i x_i / sum of w_i, bit for bit the same on every rank.

    Values travel encoded and are averaged in float32 (`hvdext.collectives.encoded`): a rank sends 2(n-1)/n of
    the encoded vector, as a ring would, and nothing is summed in the wire's few bits. What ranks tell each
    other, their rows, goes along in the first message. The float32 wire is the engine's allreduce, after a
    message of the rows.

    With errors, what encoding cuts off is added to what the same rank encodes in the next turn, of its own
    values (Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, arXiv:1901.09847)
    as of the mean of its shard (DoubleSqueeze, Tang et al. 2019, arXiv:1905.05957). Over many turns with the
    same weights the means then add up to the true ones, but for a few steps of the wire.

    Every rank of `comm` must call it. One rank alone gets its values back as they are.

    Args:
        comm: who averages.
        values: this rank's, finite, float32 or float64 of shape (m,), m static and the same on all ranks. All
            wires but float32 take them as float32.
        row: float64 of shape (k,), what this rank tells the others.
        weigh: makes of all ranks' rows, float64 of shape (comm.size, k), their weights, of shape
            (comm.size,), at least 0 and one of them above. A rank with weight 0 adds nothing.
        wire: how values travel.
        name: of the collectives.
        seed: int32 of shape (2,), for stochastic rounding; should differ between ranks and turns.
        errors: for a wire with error feedback what the last turn has returned, at first zeros of
            `error_shapes`; None: what is cut off is lost.

    Returns:
        The mean, of the values' shape and dtype, the errors for the next turn (None without), and all ranks'
        rows. If all ranks that count hold the same values, float32 gives these back: exactly where weights
        are equal and the ranks that count a power of two, else to the last two digits of their 24 bits.
    """
    if comm.size == 1:
        return values, errors, row[tf.newaxis]
    if wire.format == "float32":
        table = comm.allgather(row[tf.newaxis], f"{name}.told")
        return _mean_by_allreduce(comm, values, weigh(table), name), errors, table
    mean, errors, table = _mean_encoded(
        comm, tf.cast(values, tf.float32), row, weigh, wire, name, seed, errors
    )
    return tf.cast(mean, values.dtype), errors, table


def _mean_by_allreduce(comm, values, weights, name):
    # At most 1/size each, so that the sum stays in range; a power of two where all are equal, which is exact.
    weights = tf.cast(weights, tf.float64)
    weights *= 2.0 ** -(comm.size - 1).bit_length() / tf.reduce_max(weights)
    weights = tf.cast(weights, values.dtype)
    # This product is 0 for weight 0, whatever the values.
    (total,) = comm.allreduce([tf.math.multiply_no_nan(values, weights[comm.rank])], name)
    return total / tf.reduce_sum(weights)


def _mean_encoded(comm, values, row, weigh, wire, name, seed, errors):
    length, is_whole = values.shape[0], comm.size == 2  # of two ranks each takes the mean of all values
    sent = encoded.shards_of(values, comm.size, wire.block)
    shard = sent.shape[1]
    sent = sent if errors is None else sent + tf.reshape(errors[0], sent.shape)
    data = wire.encode(sent, seed)
    table, received = _without_row(row, encoded.scatter_shards(comm, _with_row(row, data), name, "shards"))
    rows, weights = wire.decode(received, shard), weigh(table)
    mean = _weighted(rows, weights)
    if errors is not None and not is_whole:
        mean += errors[1]
    means = encoded.gather_shards(
        comm,
        mean,
        lambda mean: wire.encode(mean, seed + tf.constant([0, 1 << 30])),
        lambda codes: wire.decode(codes, shard),
        f"{name}.means",
    )
    if errors is not None:
        arrived = rows[comm.rank] if is_whole else wire.decode(data, shard)
        cut_off = tf.where(weights[comm.rank] > 0, tf.reshape(sent - arrived, [-1]), errors[0])
        mine = means[comm.rank * shard : (comm.rank + 1) * shard]
        errors = (cut_off, errors[1] if is_whole else mean - mine)
    return means[:length], errors, table


def error_shapes(comm_size: int, m: int, wire: Wire) -> tuple[list[int], list[int]]:
    """The shapes of `mean_over_all`'s errors: of this rank's values, and of the shard whose mean it takes."""
    if comm_size <= 2:
        return [m], [0]
    shard = encoded.shard_length(comm_size, m, wire.block)
    return [comm_size * shard], [shard]


def expected_bytes(comm_size: int, m: int, wire: Wire) -> int:
    """How many bytes one rank sends in `mean_over_all` for `m` float32 values, without the rows."""
    if comm_size <= 2 or wire.format == "float32":
        return 2 * (comm_size - 1) * wire.encoded_bytes(m) // comm_size
    return 2 * (comm_size - 1) * wire.encoded_bytes(encoded.shard_length(comm_size, m, wire.block))


def mean_with_peers(
    comm: Communicator,
    values: tf.Tensor,
    weights: tf.Tensor,
    send_to: tf.Tensor,
    received_from: tf.Tensor,
    wire: Wire,
    name: str,
    seed: tf.Tensor,
    peers: int,
) -> tuple[tf.Tensor, tf.Tensor]:
    """This rank's values as its peers get them, and their weighted mean with those it gets from its peers.

    All ranks of `comm` must call it: those without a peer send and receive nothing. Who meets whom are
    tensors, so that a graph serves all turns with as many peers.

    A caller that does x += alpha * (mean - own) keeps what encoding cuts off of x, and with it, where ranks
    meet symmetrically and weights are equal, the sum over all ranks: what one gains the other loses
    (Koloskova et al. 2019, CHOCO-SGD, arXiv:1902.00340).

    Args:
        comm: all ranks, whether they have peers or not.
        values: this rank's, float32 or float64 of shape (m,), m static and the same on all ranks. All wires
            but float32 take them as float32.
        weights: float32 or float64 of shape (comm.size,), the same bits on every rank, at least 0. The values
            of a rank with weight 0 may be anything.
        send_to: int32 of shape (comm.size,), 1 for each rank that this rank sends to, not itself, else 0.
        received_from: the same for the ranks that send to this rank.
        wire: how values travel.
        name: of the collective.
        seed: int32 of shape (2,), for stochastic rounding; should differ between ranks and turns.
        peers: how many ranks `send_to` has.

    Returns:
        (own, mean), both of the values' shape and dtype. With weight 0 nobody looks at this rank's
        values and own is `values`. Where those it gets values from have no weight either, mean is own.
    """
    if comm.size == 1:
        return values, values
    dtype, length = values.dtype, values.shape[0]
    counts = weights[comm.rank] > 0
    # Float32 travels as numbers rather than their bytes: then float64 may stay what it is.
    encodes = wire.format != "float32"
    values = tf.cast(values, tf.float32) if encodes else values
    sent = tf.where(counts, values, tf.zeros_like(values))  # even 0 * NaN is NaN
    data = (wire.encode(sent, seed) if encodes else sent)[tf.newaxis]
    received = comm.alltoall(tf.tile(data, [peers, 1]), send_to, name)
    rows = tf.concat([data, received], 0)
    rows = tf.reshape(wire.decode(rows, length) if encodes else rows, [-1, length])
    ranks = tf.concat([[comm.rank], tf.where(received_from > 0)[:, 0]], 0)
    mean = _weighted(rows, tf.gather(weights, ranks), ranks)
    own = tf.where(counts, rows[0], values)
    mean = tf.where(tf.reduce_any(tf.gather(weights, ranks) > 0), mean, own)
    return tf.cast(own, dtype), tf.cast(mean, dtype)


# -- parts ----------------------------------------------------------------------------------------------


def _with_row(row, data):
    """Bytes (n, length) with the row's bytes in front of each."""
    told = tf.reshape(tf.bitcast(row, tf.uint8), [1, -1])
    return tf.concat([tf.tile(told, [data.shape[0], 1]), data], 1)


def _without_row(row, messages):
    """(the rows, float64 of shape (ranks, k), and the bytes behind them) of what has come from each rank."""
    length = 8 * row.shape[0]
    told = tf.reshape(messages[:, :length], [-1, row.shape[0], 8])
    return tf.bitcast(told, tf.float64), messages[:, length:]


def _weighted(rows, weights, ranks=None):
    """The weighted mean of `rows`, in their dtype; exact where all rows with any weight are equal.

    It is taken around the heaviest row; of several the one of the lowest rank, so that two peers get the same
    bits from rows in opposite orders.
    """
    weights = tf.cast(weights, tf.float64)
    heaviest = tf.equal(weights, tf.reduce_max(weights))
    ranks = tf.range(tf.size(weights), dtype=tf.int64) if ranks is None else tf.cast(ranks, tf.int64)
    centre = rows[tf.argmin(tf.where(heaviest, ranks, tf.int64.max))]
    shares = tf.cast(tf.math.divide_no_nan(weights, tf.reduce_sum(weights)), rows.dtype)
    return centre + tf.linalg.matvec(rows - centre, shares, transpose_a=True)
