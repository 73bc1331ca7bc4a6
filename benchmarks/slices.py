"""What an exchange of a layer that is cut over ranks takes.

    python benchmarks/slices.py

A transformer's layer (attention of 4 heads over 64 tokens of 256 numbers, dense layers of 1024 and 256
units), batches of 8, is cut over two ranks: its attention by heads, its dense layers by column and row. It is
trained through shared memory and, with the same engine, through Gloo; runs of the two alternate. Beside it,
in turn in the same processes, each rank trains what is left to it after the cut, by itself: half the heads
and units, and no exchange. The difference of the two, over the number of exchanges in a step, is what one
takes, with what ranks wait for each other. Each rank has one thread, on a core of its own if there are
enough.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from measuring import figure, horovodrun, print_load, result_of

HERE = Path(__file__).resolve().parent
DEADLINE = 600  # seconds per run


def main():
    options = parse_arguments()
    command = [*horovodrun(options.ranks), str(HERE / "slices_worker.py")]
    command += ["--rounds", str(options.rounds), "--steps", str(options.steps), "--result"]
    ways = {"memory": {}, "sockets": {"HVDEXT_LOCAL": "0"}}
    runs = {way: [] for way in ways}
    for _ in range(options.launches):
        for way, env in ways.items():
            runs[way].append(result_of(command, DEADLINE, env))
    taken = {}
    for way, results in runs.items():
        cut, alone = ([1e3 * s for result in results for s in result[kind]] for kind in ("cut", "alone"))
        exchanges = results[0]["exchanges"]
        title = f"transformer's layer, {options.ranks} ranks, {way}"
        figure(f"{title}, step", cut, "ms")
        figure(f"{title}, step of a rank's share alone", alone, "ms")
        each = [(c - a) / exchanges for c, a in zip(cut, alone, strict=True)]
        what = f"{title}, each of {exchanges:.0f} exchanges of {results[0]['bytes'] / 1e3:.0f} kB"
        taken[way] = figure(what, each, "ms")
    figure(
        "an exchange through sockets over one through memory", [taken["sockets"] / taken["memory"]], "ratio"
    )
    speeds = [statistics.median(s for r in runs[way] for s in r["cut"]) for way in ("sockets", "memory")]
    figure("a step through sockets over one through memory", [speeds[0] / speeds[1]], "ratio")
    print_load()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launches", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of both within a run")
    parser.add_argument("--steps", type=int, default=60, help="training steps per measurement")
    return parser.parse_args()


if __name__ == "__main__":
    main()
