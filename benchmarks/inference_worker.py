"""One rank of inference.py."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import keras
import models
import numpy as np
import tensorflow as tf
from measuring import peak_resident, resident, take_core

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use

BATCH = 128
WIDTH = 4096  # numbers per row of the predictions that are streamed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("measure", choices=["throughput", "memory"])
    parser.add_argument("job", type=json.loads)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    take_core(hvd.local_rank(), hvd.local_size())
    found = {"throughput": throughput, "memory": memory}[options.measure](**options.job)
    if hvd.rank() == 0:
        options.result.write_text(json.dumps(found))


def throughput(rounds, rows):
    """Rows/s of each kind and round."""
    keras.utils.set_random_seed(0)  # the same weights on all ranks
    model = models.cnn()
    images = np.random.default_rng(0).random((rows, 28, 28, 1), np.float32)
    share = images[hvd.rank() * rows // hvd.size() : (hvd.rank() + 1) * rows // hvd.size()]
    alone = SoloComm()

    def on_one_rank():
        with use(alone):
            hvd.predict(model, images, BATCH, verbose=0)

    kinds = {
        "model.predict": (lambda: model.predict(images, BATCH, verbose=0), False),
        "hvd.predict, 1 rank": (on_one_rank, False),
        "model.predict, each its share": (lambda: model.predict(share, BATCH, verbose=0), True),
        f"hvd.predict, {hvd.size()} ranks": (lambda: hvd.predict(model, images, BATCH, verbose=0), True),
    }
    found = {name: [] for name in kinds}
    for number in range(rounds + 1):
        for name, (action, is_shared) in kinds.items():
            hvd.barrier()
            start = time.perf_counter()
            if is_shared or hvd.rank() == 0:
                action()
            seconds = time.perf_counter() - start
            hvd.barrier()
            if number:  # the first round compiles
                found[name].append(rows / seconds)
    return found


def memory(gigabytes):
    """What this rank holds before, and at the most beyond that."""
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(WIDTH)])
    model.set_weights([np.random.default_rng(1).normal(size=w.shape) for w in model.get_weights()])
    rows = int(gigabytes * 1e9) // (4 * WIDTH)
    x = np.random.default_rng(2).random((rows, 8), np.float32)
    hvd.predict(model, x[: 4 * BATCH], BATCH, verbose=0)
    before = resident()
    with tempfile.TemporaryDirectory() as mine:
        folder = hvd.broadcast_object(mine)  # rank 0's, which alone writes
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.perf_counter()
        predictions = hvd.predict(model, x, BATCH, output=Path(folder, "predictions"), verbose=0)
        seconds = time.perf_counter() - start
        peak = peak_resident()
        size = predictions.nbytes if hvd.rank() == 0 else 0
        del predictions
    return {"before": before, "peak": peak - before, "bytes": size, "seconds": seconds}


if __name__ == "__main__":
    main()
