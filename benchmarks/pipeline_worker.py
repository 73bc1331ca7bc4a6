"""One process of `model_parallel.py`: trains a stack of equal dense layers, cut into stages or whole.

pipeline_worker.py idle|plain|pipeline|efficiency --units ... RESULT
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from clock import Clock
from measuring import peak_resident, take_core

# A second thread, on the same core: with one alone a message that is ready to be sent would wait for the pass
# that this thread makes.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(2)


def main():
    options = parse_arguments()
    take_core(int(os.environ.get("HOROVOD_LOCAL_RANK", 0)), ranks=2)
    if options.what == "idle":
        tf.function(lambda x: x + 1)(tf.zeros([1]))
        result = {}
    else:
        actions = {"plain": train_plain, "pipeline": train_pipeline, "efficiency": compare}
        result = actions[options.what](options)
    result["peak"] = peak_resident()
    if os.environ.get("HOROVOD_RANK", "0") == "0":
        options.result.write_text(json.dumps(result))


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("idle", "plain", "pipeline", "efficiency"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--units", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--microbatches", type=int)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, help="efficiency: measurements")
    parser.add_argument("result", type=Path)
    return parser.parse_args()


def build_model(options):
    dense = [
        keras.layers.Dense(options.units, activation="tanh", name=f"dense_{i}") for i in range(options.layers)
    ]
    return keras.Sequential([keras.Input((options.units,)), *dense], name="stack")


def train_plain(options):
    model = build_model(options)
    model.compile(options.optimizer, "mse")
    fit(model, options)
    return {}


def train_pipeline(options):
    import hvdext as hvd

    hvd.init(process_sets="dynamic")
    fit(pipeline_of(options, hvd, hvd.Grid(pipeline=hvd.size())), options)
    return {"peaks": hvd.allgather_object(peak_resident())}


def compare(options):
    """All ranks as one pipeline, and each rank on its own with the whole model, in turn in these processes.

    Returns:
        "alone" and "pipeline": seconds per step of each round, the mean over the ranks and that of the
        slowest one. "bytes": what rank 0 has sent per step.
    """
    import hvdext as hvd

    hvd.init(process_sets="dynamic")
    alone = pipeline_of(options, hvd, hvd.Grid(data=hvd.size()))
    pipeline = pipeline_of(options, hvd, hvd.Grid(pipeline=hvd.size()))
    found = {"alone": [], "pipeline": []}
    for _ in range(options.rounds + 1):
        found["alone"].append(np.mean(hvd.allgather_object(fit(alone, options))))
        before = sent_so_far(hvd)
        found["pipeline"].append(max(hvd.allgather_object(fit(pipeline, options))))
        sent = (sent_so_far(hvd) - before) / options.steps
    # The first round builds the graphs.
    return {name: seconds[1:] for name, seconds in found.items()} | {"bytes": sent}


def pipeline_of(options, hvd, grid):
    def build():
        return build_model(options)

    ranks = grid.shape.pipeline
    plan = hvd.plan(build, places=ranks * (2 if options.schedule == "interleaved" and ranks > 1 else 1))
    model = hvd.pipeline(
        build, plan, options.microbatches, options.schedule, grid=grid, recompute=options.recompute
    )
    model.compile(options.optimizer, "mse")
    return model


def sent_so_far(hvd):
    traffic = hvd.traffic()
    return traffic["pipeline"].bytes if "pipeline" in traffic else 0


def fit(model, options):
    """Trains for so many steps; returns the seconds that each but the first has taken."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(options.batch_size, options.units)).astype("float32")
    data = tf.data.Dataset.from_tensors((x, x)).repeat(options.steps)
    clock = Clock()
    model.fit(data, epochs=1, shuffle=False, verbose=0, callbacks=[clock])
    return clock.seconds_per_step(warmup=1)


if __name__ == "__main__":
    main()
