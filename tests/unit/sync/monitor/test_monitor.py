"""What `SyncMonitor` says, against the same worked out in NumPy."""

import importlib.util
import math
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.sync.monitor.noise_scale import NoiseScale, estimates
from hvdext.sync.monitor.records import Curve, Tally
from hvdext.testing import run_ranks
from tests.multiprocess.programs import sync_simulation as simulation
from tests.multiprocess.programs.sync_programs import build_model, put, train

STEPS = 12  # in two epochs
NUMBERS = {
    "exchanges",
    "divergence",
    "divergence_max",
    "bytes_sent",
    "bytes_saved",
    "seconds_waiting",
    "seconds_overlapped",
    "share_waiting",
    "share_overlapped",
    "staleness",
    "staleness_max",
    "steps_apart",
    "noise_scale",
}
LAYERS = [f"layer{i}" for i in range(4)]


def drive(comm, sync, monitor, monitor_first=False):
    """Pretends to train two epochs; returns the logs of each."""
    model = build_model()
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    put(model, simulation.start(0))
    order = [monitor, sync] if monitor_first else [sync, monitor]
    callbacks = keras.callbacks.CallbackList(order, add_history=True, model=model, epochs=2, steps=STEPS // 2)
    callbacks.on_train_begin()
    for epoch in range(2):
        callbacks.on_epoch_begin(epoch)
        for batch in range(STEPS // 2):
            train(model, comm.rank, epoch * STEPS // 2 + batch + 1)
            callbacks.on_train_batch_end(batch)
        callbacks.on_epoch_end(epoch, {})
    callbacks.on_train_end()
    history = model.history.history
    return [
        {name.removeprefix("sync/"): values[epoch] for name, values in history.items()} for epoch in (0, 1)
    ]


def squared_distances(n, every, fragments=1, delay=0):
    """(step, squared distance of each rank by layer) at each exchange, as far as it is known by then."""
    x = np.array([simulation.start(0)] * n)
    latest = np.zeros((n, 4))
    in_flight, found = {}, []
    for step in range(1, STEPS + 1):
        x = x + np.array([simulation.update(rank, step) for rank in range(n)])
        for p in range(fragments):
            where = simulation.layers_of_fragment(p, fragments)
            if p in in_flight and in_flight[p][0] + delay == step:
                x[:, where] += in_flight.pop(p)[1]
            if simulation.due(step, every, p, fragments):
                away = x - x.mean(axis=0)
                for i in range(p, 4, fragments):
                    latest[:, i] = np.square(away[:, simulation.LAYERS[i]]).sum(axis=1)
                found.append((step, latest.copy()))
                if delay:
                    in_flight[p] = (step, -away[:, where])
                else:
                    x[:, where] -= away[:, where]
    return found


# -- distances, staleness, bytes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "monitor_first", "make", "options"),
    [
        (2, True, lambda s: s.LocalSGD(3), {"every": 3}),
        (3, False, lambda s: s.LocalSGD(2), {"every": 2}),
        (
            4,
            True,
            lambda s: s.PartialSync(s.Rotating(2), 4, delay=1),
            {"every": 4, "fragments": 2, "delay": 1},
        ),
    ],
)
@pytest.mark.slow
def test_distances_are_those_of_a_simulation(n, monitor_first, make, options):
    def rank(comm):
        monitor = hvd.callbacks.SyncMonitor()
        logs = drive(comm, make(hvd.sync), monitor, monitor_first)
        assert comm.traffic()["sync"].bytes >= logs[-1]["bytes_sent"] > 0
        if monitor_first and not options.get("delay"):  # before the sync's beginning, after its last exchange
            assert comm.traffic()["sync"].bytes == logs[-1]["bytes_sent"]
        return logs, monitor.records

    expected = squared_distances(n, **options)
    # A merge of the last epoch comes after its end where there is a delay.
    counted = [
        [i for i, (step, _) in enumerate(expected) if lo < step + options.get("delay", 0) <= hi]
        for lo, hi in [(0, STEPS // 2), (STEPS // 2, STEPS)]
    ]
    totals = np.array([squares.sum(axis=1) for _, squares in expected])
    mean, largest = np.sqrt(totals.mean(axis=1)), np.sqrt(totals.max(axis=1))
    for logs, records in run_ranks(n, rank):
        assert records.divergence.x == records.farthest.x == [step for step, _ in expected]
        np.testing.assert_allclose(records.divergence.y, mean, rtol=1e-4)
        np.testing.assert_allclose(records.farthest.y, largest, rtol=1e-4)
        for i, layer in enumerate(LAYERS):
            fragments = options.get("fragments", 1)
            mine = [
                (step, squares[:, i])
                for step, squares in expected
                if simulation.due(step, options["every"], i % fragments, fragments)
            ]
            assert records.layers[layer].x == [step for step, _ in mine]
            np.testing.assert_allclose(
                records.layers[layer].y, [np.sqrt(squares.mean()) for _, squares in mine], rtol=1e-3
            )
        for found, which in zip(logs, counted, strict=True):
            assert found["exchanges"] == len(which)
            assert found["divergence"] == pytest.approx(mean[which].mean(), rel=1e-4)
            assert found["divergence_max"] == pytest.approx(largest[which].max(), rel=1e-4)
            assert found["staleness"] == found["staleness_max"] == options.get("delay", 0)
            assert found["steps_apart"] == 0
        assert logs[0].keys() == logs[1].keys() == NUMBERS | {f"divergence/{layer}" for layer in LAYERS}
        for i, found in enumerate(logs):
            gradients = 2 * (n - 1) / n * 4 * simulation.SIZE * (i + 1) * STEPS / 2
            assert found["bytes_sent"] + found["bytes_saved"] == pytest.approx(gradients)


@pytest.mark.parametrize("delay", [0, 1])
def test_times_and_their_shares(delay):
    """Each of four exchanges takes 30 ms more."""

    def rank(comm):
        sync, monitor = hvd.sync.LocalSGD(3, delay=delay, whom=Slow()), hvd.callbacks.SyncMonitor()
        begin = time.perf_counter()
        logs = drive(comm, sync, monitor)
        return logs, time.perf_counter() - begin, sync.totals

    class Slow(hvd.sync.Everyone):
        def turn(self, comm, number):
            time.sleep(0.03)
            return super().turn(comm, number)

    for logs, seconds, totals in run_ranks(2, rank):
        waiting, overlapped = (
            sum(log[f"seconds_{kind}"] for log in logs) for kind in ("waiting", "overlapped")
        )
        assert 0 < waiting <= totals.waited
        assert waiting + overlapped >= 0.03 * (4 if delay == 0 else 3)
        if delay == 0:
            assert waiting == pytest.approx(totals.waited, rel=1e-6)
        for log in logs:
            assert log["share_waiting"] * seconds > log["seconds_waiting"] > 0
            assert log["share_waiting"] <= 1


@pytest.mark.slow
def test_two_syncs_are_added_up():
    """One exchanges two layers, the other the rest: together what one sync of all would say."""

    def rank(comm, split):
        parts = [hvd.sync.Matching("layer[01]/*"), hvd.sync.Matching("layer[23]/*")]
        syncs = [hvd.sync.PartialSync(part, 3) for part in parts] if split else [hvd.sync.LocalSGD(3)]
        monitor = hvd.callbacks.SyncMonitor()
        return drive(comm, syncs, monitor)[-1], monitor.records.divergence.y[-1]

    for (two, last), (one, expected) in zip(run_ranks(2, rank, True), run_ranks(2, rank, False), strict=True):
        assert two["exchanges"] == 2 * one["exchanges"]
        assert last == pytest.approx(expected, rel=1e-5)
        assert two["divergence/layer3"] == pytest.approx(one["divergence/layer3"], rel=1e-5)


# -- noise scale ----------------------------------------------------------------------------------------


def test_estimates_find_a_known_gradient_and_covariance():
    """Batches of 4 and 32 samples from a normal distribution."""
    generator = np.random.default_rng(0)
    gradient, scales = np.array([0.5, -1.0, 0.2]), np.array([1.0, 2.0, 0.5])
    found = []
    for _ in range(4000):
        samples = gradient + scales * generator.normal(size=(8, 4, 3))
        small = np.square(samples.mean(axis=1)).sum(axis=1).mean()
        big = np.square(samples.mean(axis=(0, 1))).sum()
        found.append(estimates(small, big, 4, 32))
    square, noise = np.mean(found, axis=0)
    assert square == pytest.approx(np.sum(gradient**2), rel=0.03)
    assert noise == pytest.approx(np.sum(scales**2), rel=0.03)


def test_noise_scale_is_the_ratio_of_moving_averages():
    scale = NoiseScale(decay=0.5)
    assert math.isnan(scale.value)
    scale.add("a", 1.0, 6.0)
    scale.add("a", 4.0, 12.0)  # means (1/2 + 4) / (3/2) = 3 and (3 + 12) / (3/2) = 10
    assert scale.value == pytest.approx(10 / 3)
    scale.add("b", 2.0, 5.0)
    assert scale.value == pytest.approx(15 / 5)
    scale.add("b", -100.0, 5.0)
    assert math.isnan(scale.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: s.LocalSGD(2),
        lambda s: s.ParameterSync(s.Every(3, delay=1), rule=s.Outer(keras.optimizers.SGD(0.5))),
    ],
)
@pytest.mark.slow
def test_noise_scale_in_fit(make):
    """The gradient of the mean prediction of a linear layer is the mean input, whatever the weights.

    Frozen weights that differ between the ranks are exchanged as well, and must not count.
    """
    n, batch, steps = 3, 4, 16
    inputs = np.random.default_rng(3).normal(0.7, size=(n, steps, batch, 5)).astype("float32")

    def rank(comm):
        one = keras.Input((5,))
        trained, frozen = (keras.layers.Dense(1, use_bias=False) for _ in range(2))
        model = keras.Model(one, keras.layers.Add()([trained(one), frozen(one)]))
        for variable in model.variables:
            variable.assign(np.ones(variable.shape))
        frozen.trainable = False
        model.compile(keras.optimizers.SGD(0.1), lambda _, y: keras.ops.mean(y), jit_compile=False)
        apart = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: frozen.kernel.assign_add(np.full((5, 1), comm.rank + 1.0))
        )
        x = inputs[comm.rank].reshape(-1, 5)
        monitor = hvd.callbacks.SyncMonitor()
        history = model.fit(
            x,
            np.zeros(len(x)),
            batch_size=batch,
            epochs=1,
            shuffle=False,
            verbose=0,
            callbacks=[apart, monitor, make(hvd.sync)],
        )
        return history.history["sync/noise_scale"], monitor.records.noise_scale

    is_outer = make(hvd.sync).settings.rule.keeps_centre
    every = make(hvd.sync).settings.when.steps
    gradients = inputs.mean(axis=2)  # of each rank and step
    square = noise = 0.0
    expected, at = [], []
    for end in range(2 * every, steps + 1, every):
        begin = end - every + is_outer  # a delayed step is lost to the outer optimizer
        movements = gradients[:, begin:end].mean(axis=1)
        b = batch * (end - begin)
        small, big = np.square(movements).sum(axis=1).mean(), np.square(movements.mean(axis=0)).sum()
        square = 0.9 * square + (n * b * big - b * small) / (n * b - b)
        noise = 0.9 * noise + (small - big) / (1 / b - 1 / (n * b))
        expected.append(noise / square)
        at.append(end)
    for in_logs, curve in run_ranks(n, rank):
        assert curve.x[: len(at)] == at
        np.testing.assert_allclose(curve.y[: len(at)], expected, rtol=1e-3)
        if not is_outer:
            assert in_logs[-1] == pytest.approx(expected[-1], rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [lambda s: s.SMA(2, 0.5), lambda s: s.LocalSGD(2, whom=s.Ring()), lambda s: s.EASGD(2)],
)
@pytest.mark.slow
def test_no_noise_scale_where_ranks_do_not_start_from_a_mean(make):
    def rank(comm):
        return fit(make(hvd.sync), hvd.callbacks.SyncMonitor())

    for history in run_ranks(2, rank):
        assert all(math.isnan(value) for value in history["sync/noise_scale"])
        assert all(value > 0 for value in history["sync/divergence"])


# -- in fit ---------------------------------------------------------------------------------------------


def fit(*callbacks, model=None, epochs=2):
    """Eight steps, by default."""
    x = np.random.default_rng(5).normal(size=(16, 3)).astype("float32") * (1 + hvd.rank())
    if model is None:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    y = x[:, :2]
    return model.fit(x, y, batch_size=4, epochs=epochs, verbose=0, callbacks=list(callbacks)).history


@pytest.mark.slow
def test_an_asynchronous_sync_is_watched_from_its_thread():
    def rank(comm):
        monitor = hvd.callbacks.SyncMonitor()
        history = fit(hvd.sync.AsyncGossip(max_staleness=1), monitor, epochs=3)
        return history, monitor.records

    for history, records in run_ranks(2, rank):
        assert sum(history["sync/exchanges"]) >= 11  # training waits for one in every step
        assert max(records.divergence.y) > 0
        assert sum(history["sync/seconds_waiting"]) > 0
        assert all(math.isnan(value) for value in history["sync/noise_scale"])


@pytest.mark.slow
def test_one_process_has_nothing_to_see(tmp_path):
    with use(SoloComm()):
        history = fit(hvd.sync.LocalSGD(2), hvd.callbacks.SyncMonitor(plot=tmp_path / "new" / "a.png"))
    for name in NUMBERS - {"noise_scale", "exchanges", "seconds_waiting", "share_waiting"}:
        assert history[f"sync/{name}"] == [0.0, 0.0], name
    assert history["sync/exchanges"] == [2.0, 2.0]
    assert all(math.isnan(value) for value in history["sync/noise_scale"])
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error:constrained_layout")
@pytest.mark.slow
def test_no_exchange_at_all(tmp_path):
    with use(SoloComm()):
        history = fit(hvd.sync.LocalSGD(100), hvd.callbacks.SyncMonitor(plot=tmp_path / "a.png"), epochs=1)
    assert history["sync/exchanges"] == history["sync/bytes_sent"] == [0.0]
    unknown = {name for name, (value,) in history.items() if math.isnan(value)}
    distances = {name for name in history if name.startswith("sync/divergence")}
    assert len(distances) == 3  # of all, the largest, of one layer
    assert unknown == distances | {
        f"sync/{name}" for name in ("staleness", "staleness_max", "steps_apart", "noise_scale")
    }
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_rank_0_writes_a_picture_and_a_log(tmp_path):
    def rank(comm):
        folder = tmp_path / str(comm.rank)
        monitor = hvd.callbacks.SyncMonitor(folder / "sync.png", folder / "log", prefix="weights")
        history = fit(hvd.sync.ParameterSync(hvd.sync.AtEnd()), hvd.sync.LocalSGD(2), monitor)
        assert {f"weights/{name}" for name in NUMBERS} < history.keys()
        return monitor.records

    records, _ = run_ranks(2, rank)
    assert not (tmp_path / "1").exists()
    assert (tmp_path / "0" / "sync.png").read_bytes().startswith(b"\x89PNG")
    (file,) = (tmp_path / "0" / "log").iterdir()
    logged = {}
    for raw in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(raw.numpy())
        for value in event.summary.value:
            logged.setdefault(value.tag, []).append((event.step, float(tf.make_ndarray(value.tensor))))
    assert records.divergence.x == [2, 4, 6, 8, 8]  # the last is the one at the end
    for tag, curve in [
        ("weights/divergence", records.divergence),
        ("weights/divergence_max", records.farthest),
        ("weights/divergence/sequential/dense", next(iter(records.layers.values()))),
        ("weights/bytes_sent", records.sent),
    ]:
        found = next(v for k, v in sorted(logged.items()) if k == tag or k.startswith(f"{tag}_"))
        assert [step for step, _ in found] == curve.x
        np.testing.assert_allclose([value for _, value in found], curve.y, rtol=1e-6)
    assert [step for step, _ in logged["weights/share_waiting"]] == [4, 8]


@pytest.mark.slow
def test_a_second_fit_begins_anew():
    def rank(comm):
        sync, monitor = hvd.sync.LocalSGD(2), hvd.callbacks.SyncMonitor()
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="ones")])
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        first = fit(sync, monitor, model=model)
        model.evaluate(np.ones((4, 3)), np.ones((4, 2)), verbose=0, callbacks=[monitor])
        second = fit(sync, monitor, model=model)
        return first, second, monitor.records.divergence.x

    for first, second, steps in run_ranks(2, rank):
        assert first["sync/exchanges"] == second["sync/exchanges"] == [2.0, 2.0]
        sums = [
            [sent + saved for sent, saved in zip(h["sync/bytes_sent"], h["sync/bytes_saved"], strict=True)]
            for h in (first, second)
        ]
        assert sums[0] == sums[1] == [4 * 8 * 4, 8 * 8 * 4]
        assert steps == [10, 12, 14, 16]


def test_a_sync_is_needed():
    with use(SoloComm()), pytest.raises(ValueError, match="`SyncMonitor` needs a sync to watch"):
        fit(hvd.callbacks.SyncMonitor())


def test_arguments(monkeypatch):
    with pytest.raises(
        ValueError, match=r"`plot` must be a path that ends with '\.png'\. Received: plot='a'"
    ):
        hvd.callbacks.SyncMonitor(plot="a")
    with pytest.raises(ValueError, match="`prefix` must be a word for names in the logs"):
        hvd.callbacks.SyncMonitor(prefix="")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"`plot` needs matplotlib: pip install 'hvdext\[examples\]'"):
        hvd.callbacks.SyncMonitor(plot="a.png")
    with pytest.raises(ImportError, match="`tensorboard` needs tensorboard"):
        hvd.callbacks.SyncMonitor(tensorboard="logs")
    hvd.callbacks.SyncMonitor()


# -- parts ----------------------------------------------------------------------------------------------


def test_curves_are_thinned_out_evenly():
    curve = Curve(limit=10)
    for x in range(75):
        curve.add(x, 2.0 * x)
    assert curve.x == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72]
    assert curve.y == [2 * x for x in curve.x]


def test_tallies():
    tally = Tally()
    assert math.isnan(tally.mean)
    assert math.isnan(tally.largest)
    for value in (-3.0, -1.0, -2.0):
        tally.add(value)
    assert (tally.mean, tally.largest, tally.count) == (-2.0, -1.0, 3)
