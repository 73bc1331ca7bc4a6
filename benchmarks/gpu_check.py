"""Whether hvdext does on a GPU what it does on CPUs; for a machine with one GPU and no network.

    make gpu-check                               # or python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --pretend     # on CPUs: TensorFlow reports a GPU, models are small

Each check is a launch of its own with a deadline: what fails or hangs does not keep the others from running.
It prints one table, writes `output/gpu-check.json`, and ends with 1 if a check has failed. Without a GPU it
says so.

- train: the README's example, XLA on by itself, on one rank and on two that share the GPU; ranks end alike.
- mixed: the same under `mixed_float16`, an overflow on one rank included.
- step: a transformer of 100 million parameters on one rank, over the same step of plain Keras.
- nccl: gradients of two ranks on one GPU through NCCL, for which each takes itself for a host of its own.
- pipeline: two stages on one GPU against one process.
- predict: predictions of two ranks against those of one process.
- serve: one rank of `hvdext serve` with a worker on the GPU, asked over HTTP.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from measuring import horovodrun, result_of

HERE = Path(__file__).resolve().parent
WORKER = HERE / "gpu_check_worker.py"
DEADLINE = 150  # seconds per check
CHECKS = {  # name: (check of the worker, ranks)
    "train, 1 rank": ("train", 1),
    "train, 2 ranks": ("train", 2),
    "mixed precision, 2 ranks": ("mixed", 2),
    "step of 100 M parameters": ("step", 1),
    "nccl, 2 ranks": ("nccl", 2),
    "pipeline, 2 ranks": ("pipeline", 2),
    "predict, 2 ranks": ("predict", 2),
    "serve": ("serve", 1),
}


def main():
    options = parse_arguments()
    gpus = physical_gpus()
    if not gpus and not options.pretend:
        sys.exit("There is no GPU that TensorFlow sees here; --pretend runs the checks on CPUs.")
    print(f"command: {shlex.join(['python', *sys.argv])}\nGPUs: {', '.join(gpus) or 'pretended'}", flush=True)
    found = {}
    for title, (check, ranks) in CHECKS.items():
        if options.only and check not in options.only:
            continue
        start = time.monotonic()
        found[title] = run(check, ranks, options.pretend)
        found[title]["took"] = round(time.monotonic() - start, 1)
        print(row(title, found[title]), flush=True)
    report = {"gpus": gpus, "pretended": options.pretend, "checks": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1))
    sys.exit(any(result["outcome"] == "failed" for result in found.values()))


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretend", action="store_true", help="on CPUs, with small models")
    parser.add_argument("--only", nargs="+", choices=sorted({check for check, _ in CHECKS.values()}))
    parser.add_argument("--json", type=Path, default=Path("output/gpu-check.json"), help="the report")
    return parser.parse_args()


def physical_gpus():
    """The names of this machine's GPUs, asked of another process, which would hold memory of them."""
    program = (
        "import tensorflow as tf; [print('GPU', d.name) for d in tf.config.list_physical_devices('GPU')]"
    )
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE)
    return [line[4:] for line in asked.stdout.splitlines() if line.startswith("GPU ")]


def run(check, ranks, pretend):
    """What a check has found: its outcome, "passed", "skipped" or "failed", and what it tells."""
    python = horovodrun(ranks) if ranks > 1 else [sys.executable]
    command = [*python, str(WORKER), check, *(["--pretend"] if pretend else []), "--result"]
    gpus = "" if pretend else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    try:
        return result_of(command, DEADLINE, {"CUDA_VISIBLE_DEVICES": gpus})
    except subprocess.TimeoutExpired:
        return {"outcome": "failed", "tells": f"not done after {DEADLINE} s"}
    except SystemExit as failure:
        return {"outcome": "failed", "tells": str(failure)[-2000:]}


def row(title, result):
    """One line of the table; what failed in full below it."""
    tells, more = result["tells"], ""
    if result["outcome"] == "failed":
        raised = r"^(?:\[\d+\]<stderr>:)?([\w.]*[A-Z]\w*: (?!Horovod detected).+)$"  # not the launcher's own
        errors = re.findall(raised, tells, re.MULTILINE)
        tells, more = (errors or [tells])[-1], f"\n{tells}"
    return f"{title:26s} {result['outcome']:8s} {result['took']:6.1f} s  {tells}{more}"


if __name__ == "__main__":
    main()
