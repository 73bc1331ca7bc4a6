"""What exchanging parameters costs and yields, beside exchanging gradients at every step.

    python benchmarks/parameter_sync.py                      # all of it
    python benchmarks/parameter_sync.py --what speed --networks loopback 200 100
    python benchmarks/parameter_sync.py --what accuracy --seeds 5
    python benchmarks/parameter_sync.py --what text
    python benchmarks/parameter_sync.py --what slow-rank

Two ranks on this machine with one TensorFlow thread and, if there are as many, one core each; `model.fit` on
Keras models, one process per rank.
Methods are expressions of `hvd.sync`; "every step" is `hvd.DistributedOptimizer`, "none" no exchange at all.
The images are Fashion-MNIST (Debian, Ubuntu: `apt-get install dataset-fashion-mnist`).

- speed: time per step over that without exchange, and bytes sent per step, on a CNN of 420,042 parameters,
  Fashion-MNIST, SGD with momentum. All methods take turns in the same two processes, round by round; a time
  is that of the slowest rank, for which a job has to wait; a ratio is the median over the rounds of a
  method's time over that of "none" in the same round. "none" is the same fit with the same clock, a callback
  that is called after every batch; only the exchange is missing. Whole periods of each schedule are timed,
  after a warm-up. Capped links are network namespaces of their own (see capped_link.py); both directions
  share the cap, and shared memory is off. With --hosts 2 the link is between two namespaces of two ranks each
  (see two_hosts.py), capped in each direction. Bytes are counted by `hvd.traffic()`; on a capped link also
  those that leave through its device, with all headers and the engine's control messages, of which there are
  some in every millisecond, whatever is trained.
- accuracy: of the same CNN after the same number of samples, with the same first weights and order of
  samples per seed; SGD with momentum 0.9, cosine decay. Learning rates are the best that --tune finds, on
  held out training images. Ranks that train on their own end with `hvd.callbacks.ConsensusAveraging`.
- text: validation loss of a transformer (2 layers, width 32, 32 bytes of context) on the sources of
  Python's standard library; AdamW, warm-up and cosine decay. --tune chooses by that same loss.
- slow-rank: samples/s of both ranks together while one sleeps before each step for as long as its step
  takes: a rank of half the speed. Synchronously both then go at half the speed, one rank's worth of samples;
  one and a half is the ideal.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import signal
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import two_hosts
from capped_link import capped_link, measured_rate, unavailable
from measuring import horovodrun, result_of

HERE = Path(__file__).resolve().parent
WORKER = HERE / "parameter_sync_worker.py"
DEADLINE = 3600  # seconds per launch
WARMUP = 64  # steps before those that are timed: a period of the longest schedule
RANKS = 2  # on one host; on each of two
NONE, EVERY_STEP = "none", "every step"

OUTER = "outer=SGD(0.7, momentum=0.5, nesterov=True)"
STREAMING = f"StreamingDiLoCo(every=32, fragments=4, delay=5, wire='int8', alpha=0.5, {OUTER})"
SPEED = [NONE, EVERY_STEP, "LocalSGD(every=8)", STREAMING, "DiLoCo(every=64, wire='int4')"]
ACCURACY = [  # learning rate @ method
    f"0.05 @ {EVERY_STEP}",
    f"0.05 @ {STREAMING}",
    f"0.05 @ DiLoCo(every=64, wire='int4', {OUTER})",
    "0.05 @ LocalSGD(every=32)",
]
# Here ranks take the common weights whole (alpha 0), which is better than half of them (1.550 instead of
# 1.543) and than the papers' momentum of 0.9 with a rate of 0.4 (1.560 with 0.012).
TEXT = [
    f"0.02 @ {EVERY_STEP}",
    f"0.02 @ StreamingDiLoCo(every=32, fragments=4, delay=1, wire='int8', {OUTER})",
]
SLOW_RANK = [EVERY_STEP, "AsyncGossip()"]
MEASURES = ("speed", "accuracy", "text", "slow-rank")


def main():
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # removes the namespace, ends the ranks
    print(f"command: {shlex.join(['python', *sys.argv])}")
    measures = {"speed": speed, "accuracy": accuracy, "text": text, "slow-rank": slow_rank}
    for name in options.what:
        print(f"\n== {name} ==", flush=True)
        measures[name](options)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument(
        "--methods",
        nargs="+",
        help="instead of the usual ones: expressions of hvd.sync, 'none', 'every step'; for accuracy and "
        "text with a learning rate: '0.05 @ LocalSGD(every=32)'",
    )
    parser.add_argument("--batch-size", type=int, help="per rank; default 32, for text 64")
    parser.add_argument("--rounds", type=int, default=7, help="speed, slow-rank: measurements of each method")
    parser.add_argument("--steps", type=int, default=512, help="speed: steps per measurement")
    parser.add_argument(
        "--networks",
        nargs="+",
        default=["loopback", "200", "100"],
        help="speed: 'loopback' or a cap in Mbit/s",
    )
    parser.add_argument("--hosts", type=int, choices=[1, 2], default=1, help="speed: see two_hosts.py")
    parser.add_argument("--seeds", type=int, help="accuracy, text: how many; default 5, for text 3")
    parser.add_argument("--epochs", type=int, default=3, help="accuracy: passes over all training images")
    parser.add_argument("--text-steps", type=int, default=4000, help="text: steps of each rank")
    parser.add_argument(
        "--tune",
        nargs="+",
        type=float,
        metavar="RATE",
        help="accuracy, text: try these learning rates with each method",
    )
    parser.add_argument("--seconds", type=float, default=10, help="slow-rank: per measurement")
    return parser.parse_args()


# -- what is measured ----------------------------------------------------------------------------------


def speed(options):
    reason = unavailable() or (two_hosts.unavailable() if options.hosts == 2 else None)
    for network in options.networks:
        if network == "loopback":
            _speed_on("loopback, not capped", nullcontext([]), options)
        elif options.hosts == 2 and not reason:
            apart = [sys.executable, two_hosts.__file__, "--rate", network, "--ranks", str(RANKS)]
            _speed_on(f"{network} Mbit/s between two hosts of {RANKS} ranks", nullcontext(apart), options)
        elif reason:
            print(f"\n{network} Mbit/s: skipped; {reason}")
        else:
            _speed_on(f"{network} Mbit/s", capped_link(int(network)), options)


def _speed_on(network, link, options):
    methods = options.methods or SPEED
    methods = methods if NONE in methods else [NONE, *methods]
    plans = {method: {"warmup": WARMUP, "steps": options.steps} for method in methods}
    batch_size = options.batch_size or 32
    with link as inside:
        if inside:
            if options.hosts == 1:
                network += f" ({measured_rate(inside):.0f} of payload)"
            if EVERY_STEP in plans:  # takes many times longer than the others
                plans[EVERY_STEP] = {"warmup": 4, "steps": max(1, options.steps // 16)}
        job = {"methods": plans, "rounds": options.rounds, "batch_size": batch_size}
        found = launch("speed", job, inside, options.hosts)
    print(f"\n{network}: {options.rounds} rounds of {options.steps} steps, batch size {batch_size}")
    rows = [["method", "ms/step", "over none", "lowest to highest", "bytes/step", "fewer", "on the device"]]
    for method, measured in found.items():
        seconds, sent = measured["seconds"], measured["bytes"]
        ratios = over(seconds, found[NONE]["seconds"])
        synchronous = found.get(EVERY_STEP, measured)["bytes"]
        rows.append(
            [
                method,
                f"{1000 * statistics.median(seconds):.2f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
                f"{sent:,.0f}",
                f"{synchronous / sent:.1f}x" if sent else "",
                f"{measured['device_bytes']:,.0f}" if inside else "",
            ]
        )
    print_table(rows)


def accuracy(options):
    job = {
        "methods": with_rates(options.methods or ACCURACY, options.tune),
        "epochs": options.epochs,
        "batch_size": options.batch_size or 32,
        "held_out": bool(options.tune),
    }
    on = "held out training images" if options.tune else "test images"
    print(f"{options.epochs} epochs, batch size {job['batch_size']}, accuracy on 10,000 {on}")
    found, synchronous = over_seeds("accuracy", job, options.seeds or 5)
    rows = [["method", "learning rate", "accuracy", "standard error", f"points over {EVERY_STEP}"]]
    for (method, rate), scores in zip(job["methods"], found, strict=True):
        mean = statistics.mean(scores)
        difference = f"{100 * (mean - synchronous):+.2f}" if synchronous else ""
        rows.append([method, f"{rate:g}", f"{mean:.4f}", standard_error(scores), difference])
    print_table(rows)


def text(options):
    job = {
        "methods": with_rates(options.methods or TEXT, options.tune),
        "steps": options.text_steps,
        "batch_size": options.batch_size or 64,
    }
    print(f"{options.text_steps} steps, batch size {job['batch_size']}, validation loss in nats per byte")
    found, synchronous = over_seeds("text", job, options.seeds or 3)
    rows = [["method", "learning rate", "loss", "standard error", f"over {EVERY_STEP}"]]
    for (method, rate), losses in zip(job["methods"], found, strict=True):
        mean = statistics.mean(losses)
        ratio = f"{mean / synchronous:.4f}" if synchronous else ""
        rows.append([method, f"{rate:g}", f"{mean:.4f}", standard_error(losses), ratio])
    print_table(rows)


def slow_rank(options):
    methods = options.methods or SLOW_RANK
    methods = [EVERY_STEP, *(method for method in methods if method != EVERY_STEP)]
    batch_size = options.batch_size or 32
    job = {"methods": methods, "rounds": options.rounds, "seconds": options.seconds, "batch_size": batch_size}
    found = launch("slow-rank", job)
    print(f"rank 1 sleeps {1000 * found['pause']:.2f} ms before each step; batch size {batch_size}")
    synchronous = found["rates"][EVERY_STEP]
    rows = [["method", "samples/s, both ranks", f"over {EVERY_STEP}", "lowest to highest"]]
    for method, rates in found["rates"].items():
        ratios = over(rates, synchronous)
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append([method, f"{statistics.median(rates):,.0f}", f"{statistics.median(ratios):.3f}", spread])
    print_table(rows)


def over_seeds(measure, job, seeds):
    """Launches once per seed; returns each method's results, and the best synchronous mean."""
    launches = []
    for seed in range(seeds):
        launches.append(launch(measure, {**job, "seed": seed}))
        print(f"seed {seed}: {', '.join(f'{result:.4f}' for result in launches[-1])}", flush=True)
    found = list(zip(*launches, strict=True))
    synchronous = [
        statistics.mean(results)
        for (method, _), results in zip(job["methods"], found, strict=True)
        if method == EVERY_STEP
    ]
    best = min if measure == "text" else max
    return found, best(synchronous, default=None)


def with_rates(methods, tuned):
    """Splits each '0.05 @ method' into the method and its learning rate, or all rates that are tried."""
    pairs = []
    for entry in methods:
        rate, separator, method = entry.partition("@")
        if not separator:
            sys.exit(f"`--methods` must be 'learning rate @ method' here. Received: {entry!r}.")
        pairs += [(method.strip(), float(rate)) for rate in tuned or [rate]]
    return pairs


def over(values, base):
    """The ratios, round by round."""
    return [value / other for value, other in zip(values, base, strict=True)]


def standard_error(values):
    """Of the mean, as text; empty for a single value."""
    return f"{statistics.stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""


# -- how it is done ------------------------------------------------------------------------------------


def launch(measure, job, inside=(), hosts=1):
    """Runs the worker on all ranks and returns what rank 0 found.

    Args:
        measure: the worker's function.
        job: its arguments.
        inside: what goes before the command, so that it runs on a capped link.
        hosts: of two, `inside` starts the ranks.
    """
    loopback = ["--network-interfaces", "lo"] if inside else []
    python = horovodrun(RANKS, *loopback) if hosts == 1 else [sys.executable]
    # Ranks of one host would not use the link that stands for one between hosts.
    env = {"HVDEXT_LOCAL": "0"} if inside and hosts == 1 else {}
    return result_of([*inside, *python, str(WORKER), measure, json.dumps(job)], DEADLINE, env)


def print_table(rows):
    """Columns as wide as their widest cell; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for cell, width in zip(row, widths, strict=True):
            is_number = re.match(r"[-+]?[\d.,]+x?$", cell)
            cells.append(cell.rjust(width) if is_number else cell.ljust(width))
        print("  ".join(cells).rstrip(), flush=True)


if __name__ == "__main__":
    main()
