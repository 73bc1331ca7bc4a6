"""What a model that is spread over ranks takes: memory, time and bytes.

    python benchmarks/model_parallel.py

Slices: peak memory and bytes of a model whose layers are cut over two ranks; see sliced_memory.py.

Pipeline, two ranks, each with all its threads on a core of its own:

- Memory: the most that a rank holds while it trains 48 dense layers of 1448 units (400 MB of weights) with
  Adam, batches of 1024 rows in 8 micro-batches, above what a process holds that has imported TensorFlow and
  run one operation; over the same for one process with plain Keras, and for one that takes the same
  micro-batches. (Plain Keras applies each gradient as it comes, so that it never holds all of them; how many
  differs from run to run.)
- Efficiency: 8 dense layers of 2048 units, 8 micro-batches of 128 rows, SGD. The time per step of one rank
  that takes the same micro-batches in turn through the whole model, over twice that of the pipeline. At
  best it is m / (m + p - 1), since ranks wait for each other at the start and the end of a batch. Both are
  measured in turn in the same processes, which follows a machine whose speed changes: one rank's time is the
  mean of the two, which then have nothing to do with each other; the pipeline's is that of the slower rank.
  The ratio is the median over all rounds.
- Bytes: what rank 0 has sent per step, by its ledger, over the formula: activations of all rows, and 64 bytes
  for loss, overflow and three marks of each rank's batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import sliced_memory
from measuring import horovodrun, result_of

from hvdext.placement.pipeline.schedule import SCHEDULES, ideal_efficiency

HERE = Path(__file__).resolve().parent
WORKER = HERE / "pipeline_worker.py"
RANKS = 2
MEGABYTES = 400  # of weights
MICROBATCHES = 8
LARGE = {"layers": 48, "units": 1448, "batch-size": 1024, "optimizer": "adam"}
BALANCED = {"layers": 8, "units": 2048, "batch-size": 1024, "optimizer": "sgd"}
DEADLINE = 600  # seconds per run


def main():
    options = parse_arguments()
    print(sliced_memory.table(sliced_memory.measure(MEGABYTES, RANKS)))
    pipeline_memory()
    pipeline_time_and_bytes(options)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", type=int, default=2, help="of the efficiency part")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of both within a launch")
    parser.add_argument("--steps", type=int, default=5, help="training steps per measurement")
    parser.add_argument("--schedule", choices=SCHEDULES, default="eager-1f1b")
    return parser.parse_args()


def pipeline_memory():
    few = {"steps": 4, "microbatches": MICROBATCHES}
    idle = run("idle", 1)["peak"]
    plain = run("plain", 1, LARGE | few)["peak"] - idle
    alone = run("pipeline", 1, LARGE | few)["peak"] - idle
    stages = [peak - idle for peak in run("pipeline", RANKS, LARGE | few)["peaks"]]
    print(
        f"pipeline, memory above an idle process ({idle / 2**20:.0f} MiB): "
        f"{RANKS} ranks {' and '.join(f'{peak / 2**20:.0f}' for peak in stages)} MiB; "
        f"plain Keras {plain / 2**20:.0f} MiB, ratio {max(stages) / plain:.3f}; "
        f"one process with the same micro-batches {alone / 2**20:.0f} MiB, ratio {max(stages) / alone:.3f}"
    )


def pipeline_time_and_bytes(options):
    settings = BALANCED | {
        "steps": options.steps,
        "rounds": options.rounds,
        "microbatches": MICROBATCHES,
        "schedule": options.schedule,
    }
    launches = [run("efficiency", RANKS, settings) for _ in range(options.launches)]
    alone, together = (
        [seconds for launch in launches for seconds in launch[name]] for name in ("alone", "pipeline")
    )
    chunks_per_rank = 2 if options.schedule == "interleaved" else 1
    ideal = ideal_efficiency(RANKS, MICROBATCHES, chunks_per_rank)
    efficiencies = [one / (RANKS * both) for one, both in zip(alone, together, strict=True)]
    efficiency = statistics.median(efficiencies)
    print(
        f"pipeline, {options.schedule}, {RANKS} ranks, {MICROBATCHES} micro-batches, {len(alone)} rounds: "
        f"{1e3 * statistics.median(alone):.0f} ms per step on one rank, "
        f"{1e3 * statistics.median(together):.0f} ms on {RANKS}; efficiency {efficiency:.3f} "
        f"({min(efficiencies):.3f} to {max(efficiencies):.3f}), ideal {ideal:.3f}, "
        f"over ideal {efficiency / ideal:.3f}"
    )
    if chunks_per_rank == 1:
        sent = launches[-1]["bytes"]
        formula = 4 * BALANCED["batch-size"] * BALANCED["units"] + 64
        print(
            f"pipeline, bytes per step of rank 0: {sent:.0f}, by the formula {formula}; "
            f"ratio {sent / formula:.4f}"
        )


def run(what, ranks, settings=None):
    flags = [part for key, value in (settings or {}).items() for part in (f"--{key}", str(value))]
    python = horovodrun(ranks) if ranks > 1 else [sys.executable]
    return result_of([*python, str(WORKER), what, *flags], DEADLINE)


if __name__ == "__main__":
    main()
