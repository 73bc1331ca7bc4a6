"""What `hvd.predict` yields on two ranks, and what rank 0 holds while it streams predictions to a file.

    python benchmarks/inference.py                      # all of it
    python benchmarks/inference.py --what throughput --rounds 9
    python benchmarks/inference.py --what memory --gigabytes 4

Each rank has one TensorFlow thread and, if there are as many, one core of its own.

- throughput: rows/s of all ranks together over those of one, on a CNN of 420,042 parameters and random images
  of 28x28, batch size 128. In each round, in the same processes: plain `model.predict` on rank 0,
  `hvd.predict` on rank 0 alone, the others resting meanwhile; then plain `model.predict` on all ranks, each
  on its share of the rows without an exchange, which is what these processors allow; and `hvd.predict` on all
  ranks. A ratio is the median over the rounds; the first round, which compiles, does not count.
- memory: what rank 0 holds at the most, over what it held before, while 2 GB of predictions (4,096 numbers
  per row) go to a file in a temporary folder, which is deleted afterwards. Before means: with the model,
  after a first prediction. On one rank and on two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from measuring import horovodrun, result_of

WORKER = Path(__file__).resolve().parent / "inference_worker.py"
DEADLINE = 600  # seconds per launch
MEASURES = ("throughput", "memory")


def main():
    options = parse_arguments()
    measures = {"throughput": throughput, "memory": memory}
    for name in options.what:
        measures[name](options)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="throughput: measurements of each kind")
    parser.add_argument("--rows", type=int, default=30_000, help="throughput: images per measurement")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="memory: of predictions")
    return parser.parse_args()


def throughput(options):
    """Rows/s with `--ranks` ranks over those of one."""
    job = {"rounds": options.rounds, "rows": options.rows}
    found = launch(options.ranks, "throughput", job)
    for name, speeds in found.items():
        print(
            f"{name:28s} {statistics.median(speeds):8.0f} rows/s (median of {len(speeds)}; "
            f"{min(speeds):.0f} to {max(speeds):.0f})"
        )
    shared = found[f"hvd.predict, {options.ranks} ranks"]
    for name in ("hvd.predict, 1 rank", "model.predict", "model.predict, each its share"):
        ratio = statistics.median(s / one for s, one in zip(shared, found[name], strict=True))
        print(f"{options.ranks} ranks over {name}: {ratio:.3f}")


def memory(options):
    """Bytes that rank 0 holds beyond the model, on one rank and on several."""
    for ranks in (1, options.ranks):
        found = launch(ranks, "memory", {"gigabytes": options.gigabytes})
        print(
            f"{ranks} rank{'s' if ranks > 1 else ''}: {found['bytes'] / 1e9:.2f} GB of predictions in "
            f"{found['seconds']:.0f} s; rank 0 held {found['peak'] / 1e6:.0f} MB more than before, "
            f"of {found['before'] / 1e6:.0f} MB"
        )


def launch(ranks, measure, job):
    """What rank 0 of `ranks` has measured."""
    python = horovodrun(ranks) if ranks > 1 else [sys.executable]
    return result_of([*python, str(WORKER), measure, json.dumps(job)], DEADLINE)


if __name__ == "__main__":
    main()
