"""The weighted mean over ranks and with peers, in every wire format, ranks as threads."""

import numpy as np
import pytest
import tensorflow as tf

from hvdext.comm.communicator import SoloComm
from hvdext.sync.engine.averaging import error_shapes, expected_bytes, mean_over_all, mean_with_peers
from hvdext.sync.wire import Wire
from hvdext.testing import run_ranks

WIRES = {
    name: Wire(*name.split())
    for name in (
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "int8 error_feedback",
        "int4",
        "int4 error_feedback",
    )
}
# A step of the wire, relative to the largest magnitude: what one encoding may change at most.
STEPS = {"float32": 1e-7, "bfloat16": 1 / 256, "float16": 1 / 2048, "int8": 1 / 127, "int4": 1 / 7}


def _vector(rank, m):
    return np.random.default_rng(rank).normal(size=m).astype(np.float32)


def _mean(vectors, weights):
    return np.average(np.stack(vectors).astype(np.float64), axis=0, weights=weights)


def _assert_same_bits(found):
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].view(np.int32), other.view(np.int32))


# -- over all -------------------------------------------------------------------------------------------


def _means(comm, m, weights, wires):
    values = _vector(comm.rank, m)
    row = tf.constant([comm.rank, weights[comm.rank]], tf.float64)

    @tf.function(autograph=False)
    def means(values, row, seed):
        names = [f"hvdext.mean.{i}" for i in range(len(wires))]
        found = [
            mean_over_all(comm, values, row, _second, WIRES[wire], name, seed)
            for wire, name in zip(wires, names, strict=True)
        ]
        return [(mean, table) for mean, _, table in found]

    found = means(tf.constant(values), row, tf.constant([0, comm.rank]))
    for _, table in found:  # what the ranks have told each other
        np.testing.assert_array_equal(table, np.transpose([range(comm.size), weights]))
    return [mean.numpy() for mean, _ in found]


def _second(table):
    return table[:, 1]


def _fixed(weights):
    """A row that tells nothing, and these weights whatever is told."""
    return tf.zeros([1], tf.float64), lambda table: tf.constant(weights)


@pytest.mark.parametrize(
    ("m", "weights", "wires"),
    [
        (1001, [3.0, 1.0], list(WIRES)),
        (1001, [1000.0, 37.0, 1.0], ["float32", "float16", "int8", "int4 error_feedback"]),
        (300, [0.1, 0.2, 0.3, 2.5], ["float32", "bfloat16", "int4"]),
        (1, [1.0, 2.0, 0.5], ["float32", "int8"]),
        (400, [0.0, 1.0], ["float32", "int8"]),
        (400, [1.0, 0.0, 3.0], ["float32", "float16", "int4"]),
    ],
)
@pytest.mark.slow
def test_the_weighted_mean_is_the_same_on_every_rank(m, weights, wires):
    ranks = run_ranks(len(weights), _means, m, weights, wires)
    expected = _mean([_vector(rank, m) for rank in range(len(weights))], weights)
    largest = max(np.abs(_vector(rank, m)).max() for rank in range(len(weights)))
    for i, label in enumerate(wires):
        found = [rank[i] for rank in ranks]
        assert found[0].dtype == np.float32
        _assert_same_bits(found)
        # What the ranks encode, and of three and more the mean once more.
        encodings = 1 if len(weights) == 2 else 2
        bound = encodings * STEPS[WIRES[label].format] * largest + 1e-6
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=bound)


def _eagerly(comm):
    values, seed = tf.constant(_vector(comm.rank, 200)), tf.constant([0, comm.rank])
    return mean_over_all(comm, values, *_fixed([1.0, 2.0, 3.0]), Wire("int8"), "hvdext.eager", seed)[:2]


def test_eager_calls_give_what_a_graph_gives():
    in_graph = run_ranks(3, _means, 200, [1.0, 2.0, 3.0], ["int8"])
    for (eager, errors), (expected,) in zip(run_ranks(3, _eagerly), in_graph, strict=True):
        np.testing.assert_array_equal(eager, expected)
        assert errors is None


def _equal_values(comm, weights):
    values = (_vector(7, 3001) * 10 ** np.random.default_rng(8).uniform(-20, 20, 3001)).astype(np.float32)
    call = tf.function(
        lambda v: mean_over_all(comm, v, *_fixed(weights), Wire("float32"), "hvdext.equal", [0, 0])[0],
        autograph=False,
    )
    return values, call(tf.constant(values)).numpy()


@pytest.mark.parametrize("weights", [[3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [700.0, 3.0, 1.1]])
def test_equal_values_come_back(weights):
    for values, found in run_ranks(len(weights), _equal_values, weights):
        if len(weights) == 3:
            np.testing.assert_allclose(found, values, rtol=4 / 2**24)
        else:
            np.testing.assert_array_equal(found, values)


def _largest(comm):
    values = tf.constant([3e38, -3e38, 1e-37, 3e38 * (-1) ** comm.rank], tf.float32)
    weights = _fixed([1e9, 1e9])
    return mean_over_all(comm, values, *weights, Wire("float32"), "hvdext.largest", tf.constant([0, 0]))[0]


def test_float32_neither_overflows_nor_vanishes():
    for found in run_ranks(2, _largest):
        np.testing.assert_allclose(found, [3e38, -3e38, 1e-37, 0], rtol=1e-6)


def _float64(comm):
    values = tf.constant([1.0, 1e-12], tf.float64) * (comm.rank + 1)
    weights = tf.ones(comm.size, tf.float64)
    results = [
        mean_over_all(comm, values, *_fixed([1.0] * comm.size), Wire(f), f"hvdext.{f}", tf.constant([0, 0]))[
            0
        ]
        for f in ("float32", "bfloat16")
    ]
    peers = tf.constant(np.eye(3, dtype=np.int32)[[(comm.rank + 1) % 3, (comm.rank + 2) % 3]])
    own, mean = mean_with_peers(
        comm, values, weights, peers[0], peers[1], Wire("float32"), "hvdext.peers", tf.constant([0, 0]), 1
    )
    return [t.numpy() for t in (*results, own, mean)]


def test_float64_stays_float64():
    for rank, (plain, short, own, mean) in enumerate(run_ranks(3, _float64)):
        assert {t.dtype for t in (plain, short, own, mean)} == {np.dtype(np.float64)}
        np.testing.assert_allclose(plain, [2, 2e-12], rtol=1e-15)
        np.testing.assert_allclose(short, [2, 2e-12], rtol=1 / 100)
        np.testing.assert_array_equal(own, np.array([1, 1e-12]) * (rank + 1))
        np.testing.assert_allclose(
            mean, own / (rank + 1) * np.mean([rank + 1, (rank - 1) % 3 + 1]), rtol=1e-15
        )


def test_alone_values_come_back_as_they_are():
    values = tf.constant(_vector(0, 100))
    for wire in WIRES.values():
        mean, errors, _ = mean_over_all(SoloComm(), values, *_fixed([2.0]), wire, "hvdext.solo", [0, 0])
        np.testing.assert_array_equal(mean, values)
        assert errors is None
        nobody = tf.constant([0])
        own, mean = mean_with_peers(
            SoloComm(), values, tf.constant([2.0]), nobody, nobody, wire, "hvdext.solo", [0, 0], 0
        )
        np.testing.assert_array_equal(own, values)
        np.testing.assert_array_equal(mean, values)


def _sent(comm, m):
    @tf.function(autograph=False)
    def means(values):
        return [
            mean_over_all(
                comm, values, *_fixed([1.0] * comm.size), wire, f"hvdext.{wire.format}", tf.constant([0, 0])
            )[0]
            for wire in WIRES.values()
            if wire.rounding == "stochastic"
        ]

    means(tf.constant(_vector(comm.rank, m)))
    return {purpose: traffic.bytes for purpose, traffic in comm.traffic().items()}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.slow
def test_bytes_sent(size):
    m, ring = 50_001, 2 * (size - 1) / size
    # Bits per value with the block's scale: 4 bytes for 256 values of float16, for 128 integers.
    bits = {
        "float32": 32,
        "bfloat16": 16,
        "float16": 16 + 32 / 256,
        "int8": 8 + 32 / 128,
        "int4": 4 + 32 / 128,
    }
    for sent in run_ranks(size, _sent, m):
        assert set(sent) == set(bits)
        for format, found in sent.items():
            wire = Wire(format)
            row = 8 * (size - 1)  # one float64 to each of the others
            assert found == pytest.approx(expected_bytes(size, m, wire) + row, abs=2)
            assert found == pytest.approx(ring * wire.encoded_bytes(m), rel=0.05)
            assert found == pytest.approx(ring * m * bits[format] / 8, rel=0.05)


def test_no_rank_sends_more_than_a_ring_would():
    for size in (1, 2, 4, 8):
        for wire in WIRES.values():
            ring = 2 * (size - 1) / size * wire.encoded_bytes(1_000_000)
            assert expected_bytes(size, 1_000_000, wire) == pytest.approx(ring, rel=0.01)


def _many_turns(comm, weights, fed_back, turns):
    """The mean of all turns' means: of values that hardly change, as small ones next to large ones do."""
    wire, m = Wire("int8", "error_feedback"), 300
    values = _many_turns_values(comm.rank)
    shapes = error_shapes(comm.size, m, wire)
    errors = [tf.Variable(tf.zeros(shape)) for shape in shapes]

    @tf.function(autograph=False)
    def turn(values):
        before = tuple(errors) if fed_back else None
        mean, after, _ = mean_over_all(
            comm, values, *_fixed(weights), wire, "hvdext.turn", tf.constant([0, 0]), before
        )
        for variable, error in zip(errors, after or (), strict=False):
            variable.assign(error)
        return mean

    total, residuals = np.zeros(m), []
    for _ in range(turns):
        total += turn(tf.constant(values)).numpy()
        residuals.append(max(np.abs(error.numpy()).max(initial=0) for error in errors))
    return total / turns, max(residuals)


def _many_turns_values(rank):
    values = 0.003 * _vector(rank, 300)
    values[[0, 128, 256]] = 1.0
    return values


@pytest.mark.parametrize("weights", [[1.0, 3.0], [1.0, 2.0, 0.5]])
@pytest.mark.slow
def test_error_feedback_makes_up_for_what_was_cut_off(weights):
    turns, step = 40, 1 / 127
    expected = _mean([_many_turns_values(rank) for rank in range(len(weights))], weights)
    for mean, residual in run_ranks(len(weights), _many_turns, weights, True, turns):
        assert (
            0.3 * step < residual < step
        )  # half a step of a block whose largest value has grown by an error
        np.testing.assert_allclose(mean, expected, rtol=0, atol=2 * step / turns)
    for mean, residual in run_ranks(len(weights), _many_turns, weights, False, turns):
        assert residual == 0
        assert np.abs(mean - expected).max() > 10 * step / turns


def _silent_turn(comm, weights):
    wire, m = Wire("int4", "error_feedback"), 200
    errors = [tf.fill(shape, 0.25) for shape in error_shapes(comm.size, m, wire)]
    values = tf.constant(_vector(comm.rank, m))
    _, after, _ = mean_over_all(
        comm, values, *_fixed(weights), wire, "hvdext.silent", tf.constant([0, 0]), errors
    )
    return [error.numpy() for error in after]


@pytest.mark.parametrize("weights", [[0.0, 1.0], [0.0, 1.0, 1.0]])
def test_a_rank_of_weight_zero_keeps_its_errors_for_later(weights):
    first, second, *_ = run_ranks(len(weights), _silent_turn, weights)
    np.testing.assert_array_equal(first[0], np.full(first[0].shape, 0.25))
    assert (second[0] != 0.25).any()
    for found, shape in zip(second, error_shapes(len(weights), 200, Wire("int4")), strict=True):
        assert list(found.shape) == shape


# -- with peers -----------------------------------------------------------------------------------------


def _pairs(size, turn):
    return [[rank ^ (1 if turn == 0 else size // 2)] for rank in range(size)]


def _ring(size, turn):
    return [sorted({(rank - 1) % size, (rank + 1) % size}) for rank in range(size)]


def _exponential(size, turn):
    return [[(rank + 2**turn) % size] for rank in range(size)]


def _one_without(size, turn):
    return [[1], [0], []] if turn == 0 else [[2], [], [0]]


def _flags(size, ranks):
    flags = np.zeros(size, np.int32)
    flags[ranks] = 1
    return tf.constant(flags)


def _two_turns(comm, topology, wires, weights, broken=()):
    """Two turns with other peers through the same graph: [(own, mean)] by wire."""
    values = _vector(comm.rank, 500)
    if comm.rank in broken:
        values[:] = np.nan
    found = {}
    for label in wires:
        calls = {}
        for turn in range(2):
            sends = topology(comm.size, turn)
            peers = len(sends[comm.rank])
            if peers not in calls:

                def meet(values, sends, receives, seed, peers=peers, label=label):
                    name = f"hvdext.peers.{label.replace(' ', '_')}"
                    w = tf.constant(weights)
                    return mean_with_peers(comm, values, w, sends, receives, WIRES[label], name, seed, peers)

                calls[peers] = tf.function(meet, autograph=False)
            senders = [rank for rank in range(comm.size) if comm.rank in sends[rank]]
            pair = calls[peers](
                tf.constant(values),
                _flags(comm.size, sends[comm.rank]),
                _flags(comm.size, senders),
                tf.constant([turn, comm.rank]),
            )
            found[label, turn] = [x.numpy() for x in pair]
        assert all(call.experimental_get_tracing_count() == 1 for call in calls.values())
    return found


@pytest.mark.parametrize(
    ("topology", "weights", "wires"),
    [
        (_pairs, [1.0, 2.0, 3.0, 0.5], ["float32", "float16", "int4"]),
        (_ring, [1.0, 1.0, 4.0], ["float32", "int8"]),
        (_ring, [1.0, 2.0, 4.0, 1.0], ["int8 error_feedback"]),
        (_exponential, [2.0, 1.0, 1.0, 1.0], ["float32", "int4"]),
        (_one_without, [1.0, 1.0, 2.0], ["float32", "int8"]),
    ],
)
@pytest.mark.slow
def test_peers(topology, weights, wires):
    size = len(weights)
    ranks = run_ranks(size, _two_turns, topology, wires, weights)
    for label in wires:
        for turn in range(2):
            owns = [found[label, turn][0] for found in ranks]
            sends = topology(size, turn)
            for rank, found in enumerate(ranks):
                own, mean = found[label, turn]
                vector = _vector(rank, 500)
                if label == "float32":
                    np.testing.assert_array_equal(own, vector)
                else:
                    assert 0 < np.abs(own - vector).max() <= STEPS[WIRES[label].format] * np.abs(vector).max()
                members = [rank, *(r for r in range(size) if rank in sends[r])]
                expected = _mean([owns[r] for r in members], [weights[r] for r in members])
                np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6)
                if topology is _pairs:  # the bits, too
                    np.testing.assert_array_equal(mean, ranks[sends[rank][0]][label, turn][1])


@pytest.mark.slow
def test_symmetric_peers_of_equal_weight_keep_the_sum():
    before = np.sum([_vector(rank, 500) for rank in range(4)], 0, dtype=np.float64)
    for topology in (_pairs, _ring):
        ranks = run_ranks(4, _two_turns, topology, ["int4"], [1.0] * 4)
        moved = [
            _vector(rank, 500) + 0.5 * (mean - own)
            for rank, (own, mean) in enumerate(found["int4", 0] for found in ranks)
        ]
        np.testing.assert_allclose(np.sum(moved, 0, dtype=np.float64), before, rtol=0, atol=3e-6)
        assert np.abs(moved[0] - _vector(0, 500)).max() > 0.1


@pytest.mark.slow
def test_peers_of_weight_zero():
    # Ranks 0 and 1 meet, and 2 and 3: 1 has no weight and NaN, neither 2 nor 3 has any.
    ranks = run_ranks(4, _two_turns, _pairs, ["float32", "int8"], [2.0, 0.0, 0.0, 0.0], [1])
    for label in ("float32", "int8"):
        pairs = [found[label, 0] for found in ranks]
        own = pairs[0][0]
        assert np.abs(own - _vector(0, 500)).max() <= STEPS[label] * 4
        np.testing.assert_array_equal(pairs[0][1], own)
        np.testing.assert_array_equal(pairs[1][1], own)
        assert np.isnan(pairs[1][0]).all()
        for rank in (2, 3):
            np.testing.assert_array_equal(pairs[rank], [_vector(rank, 500)] * 2)


def _peers_sent(comm):
    _two_turns(comm, _pairs, ["int8"], [1.0] * comm.size)
    return comm.traffic()["peers"]


def test_a_rank_sends_its_vector_once_to_each_peer():
    for traffic in run_ranks(4, _peers_sent):
        assert (traffic.calls, traffic.bytes) == (2, 2 * Wire("int8").encoded_bytes(500))
