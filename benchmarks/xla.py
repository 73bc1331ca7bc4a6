"""What exchanging gradients costs where XLA compiles the training step.

    python benchmarks/xla.py             # one rank, and two
    python benchmarks/xla.py --ranks 1

A CNN, a transformer and an LSTM, Adam, batch size 32 per rank, `train_on_batch`'s own function on one batch
that stays in memory; one TensorFlow thread and, if there are enough, one core per rank. In each round all
kinds take turns in the same processes: plain Keras and `hvd.DistributedOptimizer`, compiled by XLA and not.
Times are those of the slowest rank; a ratio is the median over rounds of hvdext's time over that of plain
Keras, which exchanges nothing. With one rank Keras compiles all of the step; with more, its parts around
the exchange.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from measuring import figure, horovodrun, print_load, result_of

WORKER = Path(__file__).resolve().parent / "xla_worker.py"
DEADLINE = 600  # seconds per launch


def main():
    options = parse_arguments()
    for ranks in options.ranks:
        python = horovodrun(ranks) if ranks > 1 else [sys.executable]
        found = result_of([*python, str(WORKER), "--rounds", str(options.rounds), "--result"], DEADLINE)
        print(f"{ranks} rank{'s' if ranks > 1 else ''}")
        for model, kinds in found.items():
            for kind, seconds in kinds.items():
                print(f"{model}, {kind}: {1e3 * statistics.median(seconds):.2f} ms per step")
            for how in ("XLA", "no XLA"):
                ours, plain = kinds[f"hvdext, {how}"], kinds[f"plain Keras, {how}"]
                ratios = [a / b for a, b in zip(ours, plain, strict=True)]
                figure(f"{model}, {how}, hvdext over plain Keras, {ranks} ranks", ratios, "ratio")
    print_load()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each kind")
    return parser.parse_args()


if __name__ == "__main__":
    main()
