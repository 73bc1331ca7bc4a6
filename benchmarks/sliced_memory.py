"""Peak memory per rank of a model whose layers are cut, against one process that holds it whole.

    python benchmarks/sliced_memory.py
    python benchmarks/sliced_memory.py --megabytes 100 --ranks 4

Trains a stack of Dense layers with Adam (see sliced_memory_worker.py) and prints, for one process and each
rank, the peak of resident memory above an idle TensorFlow process, and the bytes that a step exchanges beside
those of the formula, 2 (n - 1) / n times the activations for every all-reduce.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measuring import horovodrun, result_of

WORKER = Path(__file__).with_name("sliced_memory_worker.py")
DEADLINE = 900  # seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="weights of the whole model, 10^6 bytes")
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    print(table(measure(options.megabytes, options.ranks)))


def measure(megabytes=400, ranks=2):
    """What the workers found: of one process, and of each rank with cut layers."""
    found = {}
    for name, sliced in (("whole", False), ("cut", True)):
        job = json.dumps({"megabytes": megabytes, "sliced": sliced})
        python = horovodrun(ranks) if sliced else [sys.executable]
        found[name] = result_of([*python, str(WORKER), job], DEADLINE)
    return found


def ratio(found):
    """The largest peak of any rank over that of one process."""
    return max(rank["peak"] for rank in found["cut"]) / found["whole"][0]["peak"]


def table(found):
    lines = [
        "| | weights, MB | peak above idle, MB | exchanged per step, bytes | by the formula |",
        "|---|---|---|---|---|",
    ]
    rows = [("one process", found["whole"][0]), *((f"rank {i}", r) for i, r in enumerate(found["cut"]))]
    for name, row in rows:
        lines.append(
            f"| {name} | {row['weights'] / 1e6:.0f} | {row['peak'] / 1e6:.0f} "
            f"| {row['bytes per step']:.0f} | {row['bytes by the formula']:.0f} |"
        )
    return "\n".join([*lines, f"ratio of the peaks: {ratio(found):.3f}"])


if __name__ == "__main__":
    main()
