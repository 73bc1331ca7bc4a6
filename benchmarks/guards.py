"""What it costs to look whether ranks still hold and exchange the same.

    python benchmarks/guards.py

Two ranks, one TensorFlow thread each, train models of 420,042 (a CNN) and of 10 million parameters (dense
layers) with `model.fit`, SGD with momentum and batch size 32. The same processes train three copies in turn,
round after round:

- `guarded`: as users get it, the digest of the pattern in every message and a comparison every 200 updates;
- `unlooked`: the digest, but no comparison (`check_every=0`);
- `bare`: neither.

Printed are medians of the ratios of step times within a round, and how far apart they lie. What the
measurement itself is worth is shown by a second copy of `bare`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from measuring import result_of

WORKER = Path(__file__).resolve().parent / "guards_worker.py"
DEADLINE = 1800  # seconds per run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12, help="measurements of each copy")
    parser.add_argument("--steps", type=int, default=400, help="training steps per measurement of the CNN")
    options = parser.parse_args()
    for what, steps in (("420k", options.steps), ("10M", max(options.steps // 8, 20))):
        seconds = measure(what, steps, options)
        print(f"{what}: {statistics.median(seconds['bare']) * 1e3:.2f} ms per step without guards")
        for name in ("guarded", "unlooked", "bare again"):
            report(name, seconds[name], seconds["bare"])
    print("load:", *(f"{value:.1f}" for value in os.getloadavg()))


def measure(what, steps, options):
    """Seconds per step of each copy, one for each round."""
    launcher = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(options.ranks)]
    arguments = ["--model", what, "--rounds", str(options.rounds), "--steps", str(steps), "--result"]
    return result_of([*launcher, sys.executable, str(WORKER), *arguments], DEADLINE)


def report(name, seconds, bare):
    ratios = sorted(a / b for a, b in zip(seconds, bare, strict=True))
    quarter = len(ratios) // 4
    print(
        f"  {name:10s} {statistics.median(ratios):.4f} times that (median of {len(ratios)} rounds; half of "
        f"them {ratios[quarter]:.4f} to {ratios[-1 - quarter]:.4f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
