"""How long one allreduce takes: of ten numbers, of 1.7 MB and of 40 MB.

    python benchmarks/latency.py           # through shared memory, and through Gloo with the same engine
    python benchmarks/latency.py --torch   # beside torch.distributed on Gloo (installed once)

Runs alternate. In hvdext the allreduce stands in a loop inside a graph, each of the result of the one before;
in PyTorch it is called in a Python loop, in place. Times are medians over rounds, with the lowest and the
highest. Each rank has a core of its own if there are enough. "idle" is what a rank takes of a core while
nothing is exchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from environments import torch_python
from measuring import figure, horovodrun, print_load, result_of

HERE = Path(__file__).resolve().parent
SIZES = {"10 numbers": (10, 200), "1.7 MB": (425_000, 60), "40 MB": (10_000_000, 6)}  # numbers, in a row
DEADLINE = 600  # seconds per run


def main():
    options = parse_arguments()
    worker = str(HERE / "latency_worker.py")
    hvdext = [*horovodrun(options.ranks), worker, "--stack", "hvdext"]
    ways = {"memory": (hvdext, {}), "sockets": (hvdext, {"HVDEXT_LOCAL": "0"})}
    if options.torch:
        run = [str(torch_python()), "-m", "torch.distributed.run", "--nproc-per-node", str(options.ranks)]
        ways["torch"] = ([*run, worker, "--stack", "torch"], {})
    found = {way: {} for way in ways}
    for _ in range(options.launches):
        for way, (command, env) in ways.items():
            result = result_of([*command, "--rounds", str(options.rounds), "--result"], DEADLINE, env)
            for what, times in result.items():
                found[way].setdefault(what, []).extend(times)
    for what, (numbers, _) in SIZES.items():
        for way, results in found.items():
            title = f"allreduce of {what}, {options.ranks} ranks, {way}"
            figure(title, [1e3 * seconds for seconds in results[what]], "ms")
            if numbers > 1000:
                figure(f"{title}, payload", [4e-9 * numbers / seconds for seconds in results[what]], "GB/s")
    for way, results in found.items():
        if "idle" in results:
            figure(f"idle rank, {way}", [100 * share for share in results["idle"]], "% of a core", 1)
    print_load()


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launches", type=int, default=3, help="runs of each way, in turn")
    parser.add_argument("--rounds", type=int, default=7, help="measurements within a run")
    parser.add_argument("--torch", action="store_true", help="also torch.distributed")
    return parser.parse_args()


if __name__ == "__main__":
    main()
