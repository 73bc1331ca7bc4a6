"""Every file of examples/strategies, its Python twin written by hand, and a few steps on two ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import keras
import numpy as np

from tests.multiprocess.programs.exchange_programs import Program

FILES = Path(__file__).parents[3] / "examples" / "strategies"
STEPS = 32


# -- the twins: (arguments of DistributedOptimizer or None, optimizer or None, callbacks) -------------------


def _local(hvd, sync, *, monitor=False, consensus=True, **options):
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        sync,
    ]
    callbacks += [hvd.callbacks.SyncMonitor(prefix="sync")] if monitor else []
    callbacks += [hvd.callbacks.ConsensusAveraging(take="mean", **options)] if consensus else []
    return None, None, callbacks


def _shared(hvd, **options):
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    return options, None, callbacks


def synchronous(hvd):
    return _shared(hvd, op=hvd.Average, compression=hvd.Compression.none)


def adasum(hvd):
    return _shared(hvd, op=hvd.Adasum)


def gradient_accumulation(hvd):
    return _shared(
        hvd,
        op=hvd.Average,
        backward_passes_per_step=4,
        average_aggregated_gradients=True,
        compression=hvd.Compression.fp16,
    )


def local_sgd(hvd):
    return _local(hvd, hvd.sync.LocalSGD(8, weight_by="samples"), weight_by="samples")


def post_local_sgd(hvd):
    return _local(hvd, hvd.sync.PostLocalSGD(every=8, warmup_steps=24))


def partial_sync(hvd):
    return _local(hvd, hvd.sync.PartialSync("*/kernel", every=4), consensus=False)


def hierarchical(hvd, groups=((0, 1), (2, 3))):
    sync = hvd.callbacks.ParameterSync(
        hvd.sync.Every(4), whom=hvd.sync.Hierarchical(groups, every=8), rule=hvd.sync.Mean()
    )
    return _local(hvd, sync)


def easgd(hvd):
    return _local(hvd, hvd.sync.EASGD(every=8, alpha=0.45, beta=0.9))


def sma(hvd):
    return _local(hvd, hvd.sync.SMA(every=1, alpha=0.1, momentum=0.9, wire="bfloat16"))


def diloco(hvd):
    outer = keras.optimizers.SGD(0.7, momentum=0.4, nesterov=True)
    return _local(hvd, hvd.sync.DiLoCo(every=16, outer=outer))


def streaming_diloco(hvd):
    sync = hvd.sync.StreamingDiLoCo(
        every=32,
        fragments=4,
        by="bytes",
        delay=5,
        alpha=0.5,
        wire="int8",
        outer=keras.optimizers.SGD(0.7, momentum=0.4, nesterov=True),
    )
    return _local(hvd, sync, monitor=True)


def async_gossip(hvd):
    return (
        None,
        None,
        [
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.sync.AsyncGossip(seed=0, max_staleness=50),
            hvd.callbacks.ConsensusAveraging("mean", "samples"),
        ],
    )


def slowmo(hvd):
    return _local(hvd, hvd.sync.SlowMo(every=12, beta=0.5, alpha=1.0))


def warmup_and_consensus(hvd):
    return (
        None,
        None,
        [
            hvd.callbacks.WarmupPerturbation(0.1, 0.1, unify="average", rounds=2, select="*/kernel"),
            hvd.callbacks.MetricAverageCallback(),
            hvd.callbacks.ConsensusAveraging("mean", "samples", 2, on_nonfinite="skip_rank"),
        ],
    )


def adaptive(hvd):
    sync = hvd.callbacks.ParameterSync(hvd.sync.Adaptive(2, 32, divergence=0.02))
    _, _, callbacks = _local(hvd, sync, monitor=True)
    return None, keras.optimizers.SGD(0.1, momentum=0.9), callbacks


TWINS = {
    twin.__name__: twin
    for twin in (
        synchronous,
        adasum,
        gradient_accumulation,
        local_sgd,
        post_local_sgd,
        partial_sync,
        hierarchical,
        easgd,
        sma,
        diloco,
        streaming_diloco,
        async_gossip,
        slowmo,
        warmup_and_consensus,
        adaptive,
    )
}
# Of the others tests/unit/test_strategy.py compares all settings.
COMPARED = ("gradient_accumulation", "local_sgd")
OPTIMIZER = functools.partial(keras.optimizers.SGD, 0.05)


# -- a few steps of each, told by the file and by the twin -------------------------------------------------


def _model(rank):
    keras.utils.clear_session()
    keras.utils.set_random_seed(rank + 1)  # the ranks begin apart
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def _fit(hvd, model, callbacks):
    x = np.random.default_rng(hvd.rank()).normal(size=(2 * STEPS, 3)).astype("float32")
    y = x[:, :1] - (1 + hvd.rank()) * x[:, 1:2] ** 2
    model.fit(x, y, batch_size=2, shuffle=False, callbacks=callbacks, verbose=0)
    syncs = [c for c in callbacks if isinstance(c, hvd.callbacks.ParameterSync)]
    return {
        "weights": [weight.tolist() for weight in model.get_weights()],
        "exchanges": [sync.totals.exchanges for sync in syncs],
    }


def _by_file(hvd, settings):
    strategy = hvd.Strategy.from_dict(settings)
    model = _model(hvd.rank())
    own = None if strategy.optimizer is not None else OPTIMIZER()
    strategy.compile(model, own, "mse", jit_compile=False)
    return _fit(hvd, model, strategy.callbacks())


def _by_hand(hvd, twin):
    options, optimizer, callbacks = twin(hvd)
    model = _model(hvd.rank())
    optimizer = optimizer or OPTIMIZER()
    if options is not None:
        optimizer = hvd.DistributedOptimizer(optimizer, **options)
    model.compile(optimizer, "mse", jit_compile=False)
    return _fit(hvd, model, callbacks)


def _run(name, hvd):
    settings, twin = hvd.Strategy.load(FILES / f"{name}.yaml").to_dict(), TWINS[name]
    if name == "hierarchical":  # the file is for four ranks
        settings["sync"]["whom"]["hierarchical"]["groups"] = [[0, 1]]
        twin = functools.partial(hierarchical, groups=[[0, 1]])
    result = {"file": _by_file(hvd, settings)}
    if name in COMPARED:
        result["twin"] = _by_hand(hvd, twin)
    return result


def _check(name, ranks):
    for rank in ranks:
        assert all(count > 0 for count in rank["file"]["exchanges"])
        assert rank.get("twin", rank["file"]) == rank["file"]
    first, second = (rank["file"]["weights"] for rank in ranks)
    are_equal = [a == b for a, b in zip(first, second, strict=True)]
    assert are_equal == [True, name != "partial_sync"]  # kernel, bias


PROGRAMS = {
    f"strategy: {name}": Program(functools.partial(_run, name), functools.partial(_check, name), (2,))
    for name in TWINS
}
