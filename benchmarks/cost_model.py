"""What a gradient exchange should take with more ranks than there are here: a prediction, not a measurement.

    python benchmarks/cost_model.py benchmarks/reports/<date>/report.json   # after `make bench`

Measured on this host: what a rank computes in a step, how long a small message takes, and how fast a large
one is (through shared memory, and through Gloo). An exchange is then

- within a host: latency + bytes / bandwidth of the memory, whatever the number of ranks: each sums its share;
- between H hosts, whose leaders form Gloo's ring, once for what is ready and once for the numbers:
  4 (H - 1) messages of l seconds, and 2 (H - 1) / H of the bytes at the link's bandwidth.

l is a quarter of a small allreduce of two ranks through Gloo, which passes four such messages one after the
other. Not in the model: overlap of exchange and computation, ranks that are slow at times, shared links,
messages that take longer between hosts than within one.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NEEDS = {"latency", "gradients"}  # benchmarks of a report
RANKS_PER_HOST = 8
BATCH, GRADIENT_BYTES = 32, 1_680_168  # of gradient_exchange.py
MOST_RANKS = 1024


@dataclass(frozen=True)
class Costs:
    """What has been measured on one host.

    Attributes:
        compute: seconds of a step without exchange.
        memory_latency: seconds of a small allreduce through shared memory.
        memory_bandwidth: bytes per second of a large one.
        message: seconds of one message through Gloo.
    """

    compute: float
    memory_latency: float
    memory_bandwidth: float
    message: float

    def exchange(self, hosts: int, ranks_per_host: int, numbers: float, link: float) -> float:
        """Seconds of an allreduce.

        Args:
            hosts: with `ranks_per_host` ranks each.
            ranks_per_host: 1: nothing goes through memory.
            numbers: bytes of them.
            link: bytes per second between hosts.
        """
        within = self.memory_latency + numbers / self.memory_bandwidth if ranks_per_host > 1 else 0.0
        between = 4 * (hosts - 1) * self.message + 2 * (hosts - 1) / hosts * numbers / link
        return within + between

    def efficiency(self, hosts: int, ranks_per_host: int, link: float, every: int = 1) -> float:
        """Steps with exchange over steps without, in the same time, if one step in `every` exchanges."""
        taken = self.exchange(hosts, ranks_per_host, GRADIENT_BYTES, link) / every
        return self.compute / (self.compute + taken)


def costs_of(report: dict) -> Costs:
    """The measurements of a report of suite.py, which must hold what `NEEDS` names."""
    medians = {
        each["what"]: each["median"]
        for name in sorted(NEEDS)
        for each in report["benchmarks"][name]["figures"]
    }
    reduce = "allreduce of {}, 2 ranks, {}".format
    return Costs(
        compute=BATCH / medians["hvdext, 2 ranks, per rank, without exchange"],
        memory_latency=1e-3 * medians[reduce("10 numbers", "memory")],
        memory_bandwidth=1e9 * medians[reduce("40 MB", "memory") + ", payload"],
        message=1e-3 * medians[reduce("10 numbers", "sockets")] / 4,
    )


def measured_points(report: dict) -> dict[str, float]:
    """Steps with exchange over steps without, of two ranks, by the way they exchange."""
    ratios = {
        each["what"]: each["median"]
        for each in report["benchmarks"]["gradients"]["figures"]
        if each["unit"] == "ratio"
    }
    names = {"hvdext": "through memory", "sockets": "through Gloo"}
    return {
        said: ratios[f"{name}, 2 ranks, with over without"]
        for name, said in names.items()
        if f"{name}, 2 ranks, with over without" in ratios
    }


def draw(report: dict, path: Path) -> None:
    """Writes the plot of points and predictions."""
    from matplotlib.figure import Figure

    costs = costs_of(report)
    plot = Figure(figsize=(8, 5), layout="constrained")
    axes = plot.subplots()
    ranks = 2 ** np.arange(1, int(np.log2(MOST_RANKS)) + 1)
    for said, gigabits, every in (
        ("every step, 10 Gbit/s", 10, 1),
        ("every step, 100 Gbit/s", 100, 1),
        ("one step in 32, 1 Gbit/s", 1, 32),
    ):
        predicted = [
            costs.efficiency(max(1, n // RANKS_PER_HOST), RANKS_PER_HOST, gigabits * 1e9 / 8, every)
            for n in ranks
        ]
        axes.plot(ranks, predicted, "--", label=f"predicted: {said}")
    for said, ratio in measured_points(report).items():
        axes.plot([2], [ratio], "o", label=f"measured: {said}, one host")
    axes.set(
        xscale="log",
        xticks=ranks,
        xticklabels=ranks,
        xlabel=f"ranks, {RANKS_PER_HOST} on each host",
        ylabel="steps with exchange over steps without",
        ylim=(0, 1.02),
        title=f"Prediction for the CNN of 420,042 parameters, {1e3 * costs.compute:.1f} ms per step",
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    plot.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="a report.json of suite.py")
    path = parser.parse_args().report
    draw(json.loads(path.read_text()), path.with_name("cost_model.png"))
    print(path.with_name("cost_model.png"))


if __name__ == "__main__":
    main()
