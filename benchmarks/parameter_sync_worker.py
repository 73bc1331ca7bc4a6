"""One rank of parameter_sync.py."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import keras
import models
import numpy as np
import tensorflow as tf
import text
from clock import Clock
from measuring import bytes_sent, take_core
from two_hosts import LINK

import hvdext as hvd

NONE, EVERY_STEP = "none", "every step"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("measure", choices=["speed", "accuracy", "text", "slow-rank"])
    parser.add_argument("job", type=json.loads)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    take_core(hvd.local_rank(), hvd.local_size())
    measure = {"speed": speed, "accuracy": accuracy, "text": text_loss, "slow-rank": slow_rank}
    found = measure[options.measure](**options.job)
    if hvd.rank() == 0:
        options.result.write_text(json.dumps(found))


# -- what is measured ----------------------------------------------------------------------------------


def speed(methods, rounds, batch_size):
    """Seconds per step of the slowest rank, for which a job has to wait, and bytes per step of each.

    Args:
        methods: maps each method to its "warmup" and "steps": not timed, and timed, in each round.
        rounds: in each of which every method has its turn.
        batch_size: per rank.

    Returns:
        For each method the seconds per step of each round, and bytes per step: by `hvd.traffic()` and on the
        device.
    """
    train, _ = models.images(held_out=False)
    found = {method: {"seconds": [], "bytes": 0, "device_bytes": 0} for method in methods}
    keras.utils.set_random_seed(0)  # all ranks begin alike, as synchronous training must
    compiled = {method: _compiled_cnn(method, keras.optimizers.SGD(0.01, momentum=0.9)) for method in methods}
    data = models.batches(_shard(train), batch_size, seed=hvd.rank())
    syncs = {method: _syncs(method) for method in methods}
    for number in range(rounds + 1):
        for method, plan in methods.items():
            hvd.barrier()
            before, device_before = _sent(), _device_bytes()
            clock = Clock()
            callbacks = [*syncs[method], clock]
            total = plan["warmup"] + plan["steps"]
            compiled[method].fit(data, steps_per_epoch=total, callbacks=callbacks, verbose=0)
            hvd.barrier()
            mine = np.array([clock.seconds_per_step(plan["warmup"]), _sent() - before])
            seconds, sent = np.max(hvd.allgather_object(mine), axis=0)
            if number:  # the first round compiles
                found[method]["seconds"].append(seconds)
                found[method]["bytes"] = sent / total
                found[method]["device_bytes"] = (_device_bytes() - device_before) / total / hvd.size()
    return found


def accuracy(methods, seed, epochs, batch_size, held_out):
    """Test accuracy of the CNN after the same number of samples.

    Args:
        methods: pairs of a method and its learning rate.
        seed: of the initial weights and the order of the samples, the same for all methods.
        epochs: passes of all ranks together over the training images.
        batch_size: per rank.
        held_out: test on training images that are held out.

    Returns:
        For each pair the accuracy, the mean over the ranks' models.
    """
    train, test = models.images(held_out)
    steps = len(train[0]) // (batch_size * hvd.size())
    found = []
    for method, rate in methods:
        keras.utils.set_random_seed(seed)
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * steps)
        model = _compiled_cnn(method, keras.optimizers.SGD(schedule, momentum=0.9))
        data = models.batches(_shard(train), batch_size, seed * hvd.size() + hvd.rank())
        _train(model, method, data, steps, epochs)
        found.append(float(np.mean(hvd.allgather_object(models.accuracy(model, test)))))
    return found


def text_loss(methods, seed, steps, batch_size):
    """Validation loss of the transformer after the same number of samples.

    Args:
        methods: pairs of a method and its learning rate.
        seed: of the initial weights and the samples, the same for all methods.
        steps: of each rank.
        batch_size: per rank.

    Returns:
        For each pair the loss in nats per byte, the mean over the ranks' models.
    """
    train, validation = text.load()
    found = []
    for method, rate in methods:
        keras.utils.set_random_seed(seed)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, steps, warmup_target=rate, warmup_steps=steps // 20
        )
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01)
        model = _compiled(text.transformer(), method, optimizer)
        data = text.batches(train, batch_size, seed * hvd.size() + hvd.rank())
        _train(model, method, data, steps, epochs=1)
        loss = model.evaluate(text.validation(validation), verbose=0)
        found.append(float(np.mean(hvd.allgather_object(loss))))
    return found


def slow_rank(methods, rounds, seconds, batch_size):
    """Samples/s of all ranks together, the last one slowed to half its speed.

    Args:
        methods: the first one synchronous; the others asynchronous, each rank as fast as it can.
        rounds: in each of which every method has its turn.
        seconds: of one measurement.
        batch_size: per rank.

    Returns:
        "pause": seconds that the slow rank sleeps before each step, as long as its step takes alone.
        "rates": for each method the samples/s of each round.
    """
    train, _ = models.images(held_out=False)
    data = models.batches(_shard(train), batch_size, seed=hvd.rank())
    keras.utils.set_random_seed(0)
    compiled = {
        method: _compiled_cnn(method, keras.optimizers.SGD(0.01, momentum=0.9)) for method in [NONE, *methods]
    }
    syncs = {method: _syncs(method) for method in methods}

    def rate(method, callbacks, steps):
        hvd.barrier()
        clock = Clock()
        compiled[method].fit(data, steps_per_epoch=steps, callbacks=[*callbacks, clock], verbose=0)
        hvd.barrier()
        return batch_size / clock.seconds_per_step(max(1, len(clock.times) // 10))

    for _ in range(2):  # the first time compiles
        step_seconds = hvd.allgather_object(batch_size / rate(NONE, [], 500))
    slowest = hvd.size() - 1
    pause = Pause(step_seconds[slowest] if hvd.rank() == slowest else 0.0)
    steps = int(seconds / (2 * step_seconds[slowest]))
    found = {method: [] for method in methods}
    for number in range(rounds + 1):
        for i, method in enumerate(methods):
            callbacks = [*syncs[method], pause]
            if i:
                callbacks.append(StopAfter(seconds))
            mine = rate(method, callbacks, 1000 * steps if i else steps)
            total = sum(hvd.allgather_object(mine))
            if number:
                found[method].append(total)
    return {"pause": step_seconds[slowest], "rates": found}


# -- how it is done ------------------------------------------------------------------------------------


def _compiled_cnn(method, optimizer):
    return _compiled(models.cnn(), method, optimizer)


def _compiled(model, method, optimizer):
    if method == EVERY_STEP:
        optimizer = hvd.DistributedOptimizer(optimizer)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def _syncs(method) -> list[keras.callbacks.Callback]:
    """What the expression `method` makes, in a list."""
    if method in (NONE, EVERY_STEP):
        return []
    names = {name: getattr(hvd.sync, name) for name in hvd.sync.__all__}
    return [eval(method, names | {"SGD": keras.optimizers.SGD})]


def _train(model, method, data, steps, epochs):
    callbacks = _syncs(method)
    if callbacks:
        callbacks.append(
            hvd.callbacks.ConsensusAveraging(optimizer_state=False, check_every=steps, verbose=0)
        )
    model.fit(data, steps_per_epoch=steps, epochs=epochs, callbacks=callbacks, verbose=0)


def _shard(split):
    return tuple(part[hvd.rank() :: hvd.size()] for part in split)


def _sent() -> int:
    """Bytes this rank has sent for gradients and weights."""
    return sum(sent.bytes for purpose, sent in hvd.traffic().items() if purpose in ("grad", "sync"))


def _device_bytes() -> int:
    """Bytes that have left this network namespace by its link to another, or by loopback if it has none."""
    return bytes_sent(LINK, "lo")


class Pause(keras.callbacks.Callback):
    """Sleeps before each step."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    def on_train_batch_begin(self, batch, logs=None):
        if self._seconds:
            time.sleep(self._seconds)


class StopAfter(keras.callbacks.Callback):
    """Ends training on this rank so many seconds after its first step, which compiles."""

    def __init__(self, seconds):
        super().__init__()
        self._seconds = seconds

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self._end = time.perf_counter() + self._seconds
        elif time.perf_counter() > self._end:
            self.model.stop_training = True


if __name__ == "__main__":
    main()
