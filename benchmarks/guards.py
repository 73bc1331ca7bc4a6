"""What it costs to look whether ranks still hold and exchange the same.

    python benchmarks/guards.py

Two ranks, one TensorFlow thread each, train models of 420,042 (a CNN) and of 10 million parameters (dense
layers) with `model.fit`, SGD with momentum and batch size 32. The same processes train four copies in turn,
round after round:

- `bare`: nobody looks;
- `digest`: the digest of the pattern, and the batch's size, in every message, but no comparison;
- `looks at each`: also a comparison at every update, where users have one in 200: two hundred times its cost;
- `bare again`: what the measurement itself is worth.

Printed are medians of differences within a round as a share of a step, by the clock and by what the ranks'
processors have done, which other programs disturb less, with the middle half of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from measuring import horovodrun, result_of

from hvdext.comm.guards import Guards

WORKER = Path(__file__).resolve().parent / "guards_worker.py"
DEADLINE = 1800  # seconds per run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each copy")
    parser.add_argument("--steps", type=int, default=50, help="training steps per measurement of the CNN")
    options = parser.parse_args()
    for what, steps in (("420k", options.steps), ("10M", max(options.steps // 8, 5))):
        times = measure(what, steps, options)
        for i, kind in enumerate(("by the clock", "of the processor")):
            taken = {name: [pair[i] for pair in pairs] for name, pairs in times.items()}
            print(f"{what}: {statistics.median(taken['bare']) * 1e3:.2f} ms per step {kind}")
            report("digest", taken["digest"], taken["bare"], taken["bare"], 1)
            report("comparison", taken["looks at each"], taken["digest"], taken["bare"], Guards().check_every)
            report("bare again", taken["bare again"], taken["bare"], taken["bare"], 1)
    print("load:", *(f"{value:.1f}" for value in os.getloadavg()))


def measure(what, steps, options):
    """Seconds per step of each copy, by the clock and of a processor, a pair for each round."""
    arguments = ["--model", what, "--rounds", str(options.rounds), "--steps", str(steps), "--result"]
    return result_of([*horovodrun(options.ranks), str(WORKER), *arguments], DEADLINE)


def report(name, more, less, step, times):
    """What `more` takes over `less`, a `times`th of it, as a share of a step."""
    shares = sorted((a - b) / c / times * 100 for a, b, c in zip(more, less, step, strict=True))
    quarter = len(shares) // 4
    print(
        f"  {name:10s} {statistics.median(shares):+.3f} % (median of {len(shares)} rounds; half of them "
        f"{shares[quarter]:+.3f} to {shares[-1 - quarter]:+.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
