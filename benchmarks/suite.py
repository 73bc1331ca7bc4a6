"""Every benchmark in turn, as one report.

    python benchmarks/suite.py                         # quick: some minutes each, without peers
    python benchmarks/suite.py --suite full            # beside stock Horovod and PyTorch; hours
    python benchmarks/suite.py --only latency serving  # some of them

Before each of them it looks whether others compute on the machine, and refuses to go on if they do. The
folder `benchmarks/reports/<date>` gets `report.json`, with every measurement, `report.md`, and plots: of each
benchmark's figures, and of what a cost model makes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cost_model
import plots
from machine import description, wait_until_quiet
from measuring import FIGURES

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Benchmark:
    """A program, and how it is called in each suite; None where it is left out.

    Attributes:
        program: its file.
        quick: arguments.
        full: arguments.
    """

    program: str
    quick: str | None
    full: str | None


BENCHMARKS = {
    "latency": Benchmark("latency.py", "--launches 1", "--torch"),
    "gradients": Benchmark(
        "gradient_exchange.py",
        "--sockets --launches 1 --rounds 4 --steps 60",
        "--sockets --torch --stock --rounds 4 --steps 100",
    ),
    "guards": Benchmark("guards.py", None, "--rounds 16 --steps 40"),
    "syncs": Benchmark(
        "parameter_sync.py", None, "--what speed slow-rank --networks 200 --rounds 7 --steps 256"
    ),
    "xla": Benchmark("xla.py", "--ranks 1 --rounds 5", ""),
    "placement": Benchmark("model_parallel.py", "--launches 1 --rounds 3", ""),
    "slices": Benchmark("slices.py", "--launches 1", ""),
    "prediction": Benchmark("inference.py", "--what throughput --rounds 3", "--rounds 9"),
    "serving": Benchmark("serving.py", "--seconds 10", ""),
    "ranks": Benchmark("serving_ranks.py", "--rounds 3", ""),
}


def main():
    options = parse_arguments()
    folder = options.folder or HERE / "reports" / time.strftime("%Y-%m-%d-%H%M")
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": description(), "suite": options.suite, "benchmarks": {}}
    for name in options.only or BENCHMARKS:
        arguments = getattr(BENCHMARKS[name], options.suite)
        if arguments is not None:
            report["benchmarks"][name] = measured(BENCHMARKS[name].program, arguments, folder)
            (folder / "report.json").write_text(json.dumps(report, indent=1))
            (folder / "report.md").write_text(as_markdown(report))
    draw_plots(report, folder)
    print(f"report: {folder / 'report.md'}")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=["quick", "full"], default="quick")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS))
    parser.add_argument("--folder", type=Path, help="for the report")
    return parser.parse_args()


def measured(program, arguments, folder):
    """Runs one benchmark; what it printed and found, and what else was going on.

    Raises:
        SystemExit: if it fails, or others compute.
    """
    taken = wait_until_quiet()
    command = [sys.executable, str(HERE / program), *shlex.split(arguments)]
    print(f"-- {program} {arguments}", flush=True)
    figures = folder / f"{program}.figures"
    figures.unlink(missing_ok=True)
    start = time.monotonic()
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {FIGURES: str(figures)}
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        sys.exit(f"{shlex.join(command)} failed with exit code {process.returncode}.")
    found = [json.loads(line) for line in figures.read_text().splitlines()] if figures.exists() else []
    figures.unlink(missing_ok=True)
    return {
        "command": f"python benchmarks/{program} {arguments}".strip(),
        "seconds": round(time.monotonic() - start),
        "taken by others before": round(taken, 3),
        "figures": found,
        "printed": lines,
    }


def draw_plots(report, folder):
    """A picture for each benchmark that has figures, and one of the cost model if there is what it needs."""
    for name, each in report["benchmarks"].items():
        if each["figures"]:
            plots.draw(name, each["figures"], folder)
    if report["benchmarks"].keys() >= cost_model.NEEDS:
        cost_model.draw(report, folder / "cost_model.png")


def as_markdown(report):
    """The report as a page."""
    lines = ["# Measured", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    for name, each in report["benchmarks"].items():
        lines += ["", f"## {name.capitalize()}", "", f"`{each['command']}`, {each['seconds']} s; before it "]
        lines[-1] += f"{each['taken by others before']:.0%} of the processors were taken by others."
        if each["figures"]:
            lines += [
                "",
                "| what | median | lowest | highest | measurements | unit |",
                "|---|---|---|---|---|---|",
            ]
            lines += [*(_row(figure) for figure in each["figures"]), "", f"![{name}]({name}.png)"]
        else:
            lines += ["", "```", *each["printed"], "```"]
    if report["benchmarks"].keys() >= cost_model.NEEDS:
        lines += ["", "## Predicted", "", "By [a cost model](../../cost_model.py), not measured:", ""]
        lines += ["![cost model](cost_model.png)"]
    return "\n".join(lines) + "\n"


def _row(figure):
    values = figure["values"]
    numbers = " | ".join(f"{value:.4g}" for value in (figure["median"], min(values), max(values)))
    return f"| {figure['what']} | {numbers} | {len(values)} | {figure['unit']} |"


if __name__ == "__main__":
    main()
