"""Wire formats: bytes, error bounds on hard inputs, and stochastic rounding."""

import numpy as np
import pytest
import tensorflow as tf

from hvdext.sync.wire import Wire, wire_of

WIRES = [
    Wire("float32"),
    Wire("bfloat16"),
    Wire("float16"),
    Wire("int8"),
    Wire("int8", "error_feedback"),
    Wire("int4"),
    Wire("int4", "error_feedback"),
]
SEED = tf.constant([3, 4])


def _there_and_back(wire, values, seed=SEED):
    return wire.decode(wire.encode(values, seed), values.shape[-1])


def _arrived(wire, values, seed=SEED):
    return _there_and_back(wire, tf.constant(values), seed).numpy()


def _bounds(wire, values):
    """The documented largest error of each value, worked out in float64."""
    x = np.abs(values.astype(np.float64))
    blocks = np.array_split(x, range(wire.block, x.size, wire.block))
    a = np.concatenate([np.full(part.size, part.max()) for part in blocks])
    nearest = wire.rounding == "error_feedback"
    bound, smallest = {
        "float32": (0 * x, 0),
        "bfloat16": (x / 256, 1.2e-38),
        "float16": (np.maximum(x / 2048, a / 2**39), 1.2e-38),
        "int8": (a / (254 if nearest else 127), 1.5e-36),
        "int4": (a / (14 if nearest else 7), 8.3e-38),
    }[wire.format]
    return bound * (1 + 1e-5) + smallest


def _hard_inputs():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=1000)
    outlier = normal.copy()
    outlier[[3, 700]] = 1e8, -7e4
    wide = rng.choice([-1, 1], 1000) * 10 ** rng.uniform(-37, 38, 1000)
    return {
        "normal": normal,
        "outlier": outlier,
        "wide": wide,
        "sorted": np.sort(np.abs(wide)),  # blocks of like values
        "huge": np.where(normal > 0, 3e38, -3e38) * rng.uniform(size=1000),
        "largest": np.full(1000, 3.3895e38),
        "half": 70000 * normal,
        "tiny": 1e-30 * normal,
        "smallest": 1e-37 * normal,
        "denormal": 1e-40 * normal,
        "zeros": np.zeros(1000),
        "one": np.eye(1, 1000, 999)[0],
        "positive": np.abs(normal) + 100,
    }


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_error_bounds_on_hard_inputs(wire):
    inputs = {name: values.astype(np.float32) for name, values in _hard_inputs().items()}
    rows = tf.constant(np.stack(list(inputs.values())))
    # Small operations run in the thread that calls them, which keeps denormals; TensorFlow's own do not.
    for call in (_there_and_back, tf.function(_there_and_back, autograph=False)):
        for name, found in zip(inputs, call(wire, rows).numpy().astype(np.float64), strict=True):
            error = np.abs(found - inputs[name].astype(np.float64))
            assert np.isfinite(found).all(), name
            excess = error - _bounds(wire, inputs[name])
            assert (excess <= 0).all(), (name, excess.max(), inputs[name][excess.argmax()])


@pytest.mark.parametrize("wire", WIRES[3:], ids=str)
def test_float32s_largest_value_stays_finite(wire):
    largest = np.finfo(np.float32).max
    values = np.array([largest, -largest, 0, largest / 3], np.float32)
    for i in range(20):
        found = _arrived(wire, values, tf.constant([i, 0]))
        levels = 127 if wire.format == "int8" else 7
        assert np.isfinite(found).all()
        assert (np.abs(found.astype(np.float64) - values) <= float(largest) / levels).all()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_bytes(wire):
    per_block = {"float32": 4, "bfloat16": 2, "float16": 516, "int8": 132, "int4": 68}[wire.format]
    for n in (1, 127, 128, 129, 1000):
        expected = -(-n // wire.block) * per_block
        rows = np.arange(2 * n, dtype=np.float32).reshape(2, n)
        one, two = wire.encode(tf.constant(rows[0]), SEED), wire.encode(tf.constant(rows), SEED)
        assert wire.encoded_bytes(n) == expected
        assert (one.dtype, one.shape, two.shape) == (tf.uint8, (expected,), (2, expected))
        assert wire.decode(one, n).shape == (n,)
        assert wire.decode(two, n).shape == (2, n)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_rows_are_encoded_one_by_one(wire):
    rows = np.array([[1e6, -3e5, 7e4], [1e-3, 2e-4, -1e-3], [0, 0, 0]], np.float32)
    found = _arrived(wire, rows)
    for row, expected in zip(found, rows, strict=True):
        assert (np.abs(row - expected) <= _bounds(wire, expected)).all()


def test_what_each_format_holds_exactly():
    powers = np.float32(2.0) ** np.arange(-20, 10, dtype=np.float32)
    for wire in WIRES[:3]:
        np.testing.assert_array_equal(_arrived(wire, powers), powers)
    steps = np.arange(-127, 128, dtype=np.float32)[[0, 1, 5, 100, 127, 254]]
    np.testing.assert_allclose(_arrived(Wire("int8", "error_feedback"), steps), steps, rtol=1e-6)
    steps = np.tile(np.arange(-7, 8, dtype=np.float32), 20)  # in both halves of a block
    np.testing.assert_allclose(_arrived(Wire("int4", "error_feedback"), steps), steps, rtol=1e-6)
    # One byte for two values: the first half of the block in the high bits, 8 added to each.
    data = Wire("int4").encode(tf.constant(np.r_[np.full(64, 7.0), np.full(64, -7.0)].astype("f4")), SEED)
    np.testing.assert_array_equal(data[:64], np.full(64, 15 * 16 + 1))


@pytest.mark.parametrize(("format", "levels"), [("int8", 127), ("int4", 7)])
def test_stochastic_rounding_has_the_right_mean(format, levels):
    turns = 4000
    values = np.linspace(-1, 1, 200, dtype=np.float32)
    values[:2], values[128:130] = [-1, 1], [1, -1]  # the largest of both blocks: the step is 1 / levels
    each = _arrived(Wire(format), np.tile(values, (turns, 1)), tf.constant([turns, 7])).astype(np.float64)
    found, spread = each.mean(0), each.std(0)
    # A value that lies f of a step above a level is rounded up with probability f.
    fraction = (values.astype(np.float64) * levels) % 1
    np.testing.assert_allclose(spread * levels, np.sqrt(fraction * (1 - fraction)), atol=0.06)
    # One in 512 of a step from random bytes, and four standard errors.
    assert (np.abs(found - values) * levels < 1 / 512 + 4.5 * 0.5 / np.sqrt(turns)).all()
    assert abs(np.mean(found - values)) * levels < 4 * 0.5 / np.sqrt(turns * values.size) + 1e-4


def test_the_seed_decides_the_bytes():
    values = tf.constant(np.random.default_rng(1).normal(size=500).astype(np.float32))
    wire = Wire("int8")
    same = [wire.encode(values, tf.constant([1, 2])).numpy() for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (same[0] != wire.encode(values, tf.constant([2, 2])).numpy()).any()
    nearest = Wire("int8", "error_feedback")
    np.testing.assert_array_equal(nearest.encode(values, [1, 2]), nearest.encode(values, [2, 2]))


def test_wire_of():
    assert wire_of("int4") == Wire("int4", rounding="stochastic")
    wire = Wire("int8", "error_feedback")
    assert wire_of(wire) is wire
    with pytest.raises(
        ValueError, match=r"`wire` must be one of .* Received: wire='flaot16'. Did you mean 'float16'"
    ):
        wire_of("flaot16")
    with pytest.raises(ValueError, match="Received: wire=8"):
        wire_of(8)
    with pytest.raises(ValueError, match=r"`rounding` must be one of .*Did you mean 'stochastic'"):
        Wire("int8", "stochastics")
    with pytest.raises(ValueError, match="'error_feedback' needs the format 'int8' or 'int4'"):
        Wire("float16", "error_feedback")
    with pytest.raises(TypeError, match="Did you mean `rounding`"):
        Wire("int8", round="stochastic")
