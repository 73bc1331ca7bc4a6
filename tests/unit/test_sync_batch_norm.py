"""`SyncBatchNormalization`: against Keras' layer with the whole batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.testing import run_ranks
from tests.multiprocess.launching.launch import run_python
from tests.multiprocess.programs import collective_programs

ROWS = [3, 5, 1]  # of the ranks


def _inputs(rank):
    generator = np.random.default_rng([3, rank])
    x = rank + generator.normal(size=(ROWS[rank], 4, 2))
    mask = generator.random(size=(ROWS[rank], 4)) < 0.6
    return x, mask, generator.normal(size=x.shape)


def _trained(layer, x, mask, weights):
    """Outputs, gradients of sum(weights * outputs**2), and the moving statistics."""
    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True, mask=mask)
        loss = tf.reduce_sum(weights * y**2)
    by_x, by_gamma, by_beta = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    statistics = [tf.identity(layer.moving_mean.value), tf.identity(layer.moving_variance.value)]
    return [y, by_x], [by_gamma, by_beta], statistics


@pytest.mark.parametrize(
    ("size", "masked", "axis", "graph"),
    [
        (2, False, -1, False),
        (3, False, 1, False),
        (3, True, -1, False),
        (2, True, 1, False),
        (3, True, -1, True),
    ],
)
def test_layer_equals_keras_with_the_whole_batch(size, masked, axis, graph):
    def run(comm):
        layer = hvd.SyncBatchNormalization(axis=axis, name="norm", dtype="float64", momentum=0.5)
        x, mask, weights = _inputs(comm.rank)
        layer.build(x.shape)
        work = tf.function(_trained) if graph else _trained
        return tf.nest.map_structure(np.array, work(layer, x, mask if masked else None, weights))

    ranks = run_ranks(size, run)
    parts = [_inputs(rank) for rank in range(size)]
    x, mask, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    layer = keras.layers.BatchNormalization(axis=axis, dtype="float64", momentum=0.5)
    layer.build(x.shape)
    per_row, by_weights, statistics = _trained(layer, x, mask if masked else None, weights)
    # Keras adds 1e-7 to the number of values that a mask leaves.
    close = {"rtol": 1e-6 if masked else 1e-10, "atol": 1e-6 if masked else 1e-10}
    ends = np.cumsum(ROWS[:size])[:-1]
    for i, whole in enumerate(per_row):
        for rank, expected in enumerate(np.split(whole, ends)):
            np.testing.assert_allclose(ranks[rank][0][i], expected, **close)
    for i, expected in enumerate(by_weights):
        np.testing.assert_allclose(sum(rank[1][i] for rank in ranks), expected, **close)
    for i, expected in enumerate(statistics):
        for rank in ranks:
            np.testing.assert_allclose(rank[2][i], expected, **close)


@pytest.mark.slow
def test_training_equals_one_process():
    program = collective_programs.PROGRAMS["batch normalization"]
    program.check(run_ranks(3, lambda comm: program.run(hvd)))


def test_a_rank_without_rows():
    def run(comm):
        layer = hvd.SyncBatchNormalization(name="norm", momentum=0.0)
        x = tf.constant([[1.0], [3.0]]) if comm.rank else tf.zeros([0, 1])
        layer(x, training=True)
        return layer.moving_mean.numpy().item(), layer.moving_variance.numpy().item()

    assert run_ranks(2, run) == [(2.0, 1.0)] * 2


def test_large_means_lose_no_digits():
    def run(comm):
        layer = hvd.SyncBatchNormalization(name="norm", momentum=0.0)
        layer(tf.constant([[4096.0 + comm.rank], [4098.0 + comm.rank]]), training=True)
        return layer.moving_variance.numpy().item()

    # 4096, 4098, 4097, 4099: squares about 4097.5 of 2.25, 0.25, 0.25, 2.25.
    assert run_ranks(2, run) == [1.25, 1.25]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_keeps_float32_statistics(policy):
    def run(comm):
        layer = hvd.SyncBatchNormalization(name="norm", momentum=0.0, dtype=policy)
        y = layer(tf.constant([[1.0], [2.0 + 4 * comm.rank]]), training=True)
        return y.dtype.name, layer.moving_mean.numpy().item(), layer.moving_variance.numpy().item()

    # 1, 2, 1, 6: mean 2.5, squares 2.25, 0.25, 2.25, 12.25.
    assert run_ranks(2, run) == [(policy.removeprefix("mixed_"), 2.5, 4.25)] * 2


def test_one_layer_twice_in_a_graph_and_only_in_training():
    def run(comm):
        layer = hvd.SyncBatchNormalization(name="norm.shared", momentum=0.0)
        layer.build((None, 1))

        @tf.function
        def step(x, training):
            return layer(x, training=training) + layer(2 * x, training=training)

        x = tf.constant([[float(comm.rank)]])
        step(x, training=False)
        before = "sync_bn" in comm.traffic()
        step(x, training=True)  # traced again, with collectives this time
        return before, comm.traffic()["sync_bn"].calls, layer.moving_mean.numpy().item()

    assert run_ranks(2, run) == [(False, 2, 1.0)] * 2


def test_alone_it_is_keras_layer():
    with use(SoloComm()):
        mine = hvd.SyncBatchNormalization(momentum=0.5)
        x = tf.constant(np.random.default_rng(0).normal(size=(5, 3)), tf.float32)
        theirs = keras.layers.BatchNormalization(momentum=0.5)
        np.testing.assert_array_equal(mine(x, training=True), theirs(x, training=True))
        np.testing.assert_array_equal(mine.moving_variance, theirs.moving_variance)


def test_second_derivatives_are_refused():
    def run(comm):
        layer = hvd.SyncBatchNormalization(name="norm")
        x = tf.constant([[1.0 + comm.rank], [2.0]])
        with tf.GradientTape() as outer, tf.GradientTape() as inner:
            outer.watch(x)
            inner.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
            first = inner.gradient(loss, x)
        outer.gradient(first, x)

    with pytest.raises(LookupError, match="first derivatives only"):
        run_ranks(2, run)


def test_saved_models_open_here_and_in_plain_keras(tmp_path):
    with use(SoloComm()):
        model = collective_programs.normalizing_model(hvd.SyncBatchNormalization, "float32")
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    expected = model(x, training=False).numpy()
    file = tmp_path / "model.keras"
    model.save(file)
    here = keras.saving.load_model(file)
    assert type(here.get_layer("first")) is hvd.SyncBatchNormalization
    np.testing.assert_array_equal(here(x, training=False), expected)
    np.save(tmp_path / "x.npy", x)
    script = (
        "import keras, numpy as np, sys\n"
        "sys.modules['hvdext'] = None  # as if it were not installed\n"
        "class SyncBatchNormalization(keras.layers.BatchNormalization):\n"
        "    pass\n"
        "known = {'hvdext>SyncBatchNormalization': SyncBatchNormalization}\n"
        "model = keras.saving.load_model('model.keras', custom_objects=known)\n"
        "assert type(model.get_layer('first')) is SyncBatchNormalization\n"
        "np.save('y.npy', model(np.load('x.npy'), training=False))\n"
    )
    run_python(script, timeout=120, cwd=tmp_path).check_returncode()
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fused": True}, r"`fused` must be False.*Received: fused=True"),
        ({"fused": None}, r"`fused` must be False.*Received: fused=None"),
        ({"synchronized": True}, r"`synchronized` is for tf.distribute.*Drop the argument"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        hvd.SyncBatchNormalization(**arguments)


def test_training_before_init(monkeypatch):
    monkeypatch.setattr("hvdext.comm.current._process_comm", None)
    with pytest.raises(RuntimeError, match=r"hvd.init\(\)"):
        hvd.SyncBatchNormalization()(tf.zeros([1, 1]), training=True)
