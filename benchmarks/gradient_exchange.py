"""What the gradient exchange costs.

    python benchmarks/gradient_exchange.py           # size-1 overhead, 2-rank throughput, bytes sent
    python benchmarks/gradient_exchange.py --stock   # beside stock Horovod 0.28.1 on Keras 2 (built once)

The model is a CNN of 420,042 parameters on 28x28 images, batch size 32 per rank, SGD with momentum, trained
with `model.fit`, one TensorFlow thread per rank. Throughput does not depend on what the images show; they are
random.

- Overhead at size 1: time per step with `DistributedOptimizer` over plain Keras, in one process, in turn.
- Throughput: images/s per rank with exchange over images/s without, in the same processes, in turn. With
  --stock, the same script runs on TensorFlow 2.15 with Horovod as published, and runs of the two alternate.
- Bytes: what went over the loopback device of a network namespace of its own, headers and control messages
  included, over 2(n-1)/n of the gradients' bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import venv
from pathlib import Path

from measuring import result_of

HERE = Path(__file__).resolve().parent
WORKER = HERE / "gradient_exchange_worker.py"
STOCK_FOLDER = HERE.parent / ".venv-stock"
STOCK_BUILD = {
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITHOUT_MPI": "1",
    "HOROVOD_CPU_OPERATIONS": "GLOO",
    "MAKEFLAGS": f"-j{os.cpu_count()}",
}
DEADLINE = 600  # seconds per run


def main():
    options = parse_arguments()
    overhead(options)
    stacks = {"hvdext": Path(sys.executable)}
    if options.stock:
        stacks["stock"] = stock_python()
    ratios = throughput(stacks, options)
    if options.stock:
        print(f"hvdext's ratio over stock's: {ratios['hvdext'] / ratios['stock']:.2f}")
    bytes_on_the_wire(options)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launches", type=int, default=3, help="runs of each stack, in turn")
    parser.add_argument("--rounds", type=int, default=7, help="measurements within a run")
    parser.add_argument("--steps", type=int, default=150, help="training steps per measurement")
    parser.add_argument("--stock", action="store_true", help="also stock Horovod on Keras 2")
    return parser.parse_args()


def overhead(options):
    """Size-1 step time with DistributedOptimizer over plain Keras."""
    results = [run([sys.executable], "hvdext", options) for _ in range(options.launches)]
    pairs = [pair for result in results for pair in zip(result["plain"], result["exchange"], strict=True)]
    ratio = statistics.median(plain / exchange for plain, exchange in pairs)
    print(f"size 1: step time over plain Keras: {ratio:.3f} (median of {len(pairs)} pairs)")


def throughput(stacks, options):
    """Images/s with exchange over images/s without, for each stack; runs of the stacks alternate."""
    results = {name: {"plain": [], "exchange": []} for name in stacks}
    for _ in range(options.launches):
        for name, python in stacks.items():
            result = run([*launcher(python, options.ranks), str(python)], name, options)
            for kind, speeds in results[name].items():
                speeds += result[kind]
    ratios = {}
    for name, speeds in results.items():
        plain, exchange = speeds["plain"], speeds["exchange"]
        ratios[name] = statistics.median(e / p for e, p in zip(exchange, plain, strict=True))
        print(
            f"{name:6s} {options.ranks} ranks: {statistics.median(exchange):6.0f} images/s per rank with "
            f"exchange, {statistics.median(plain):6.0f} without; ratio {ratios[name]:.3f} "
            f"(median of {len(plain)} pairs; {min(exchange):.0f} to {max(exchange):.0f} and "
            f"{min(plain):.0f} to {max(plain):.0f})"
        )
    return ratios


def bytes_on_the_wire(options):
    """Bytes per rank and step over loopback, over the least a ring needs."""
    unshare = shutil.which("unshare")
    script = 'ip link set lo up && exec "$@"'
    isolated = [unshare, "--net", "--map-root-user", "sh", "-c", script, "sh"]
    if not unshare or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        print("bytes: skipped; no network namespace can be made here (needs unshare and ip)")
        return
    python = Path(sys.executable)
    command = [*isolated, *launcher(python, options.ranks), "--network-interfaces", "lo", str(python)]
    result = run(command, "hvdext", options)
    least = 2 * (options.ranks - 1) / options.ranks * result["gradient_bytes"]
    wire = result["wire_bytes"]
    print(
        f"bytes: {wire:.0f} per rank and step on the wire, {least:.0f} by 2(n-1)/n of the gradients; "
        f"ratio {wire / least:.3f}"
    )


def launcher(python, ranks):
    return [str(python.with_name("horovodrun")), "-np", str(ranks)]


def run(command, stack, options):
    """Runs the worker and returns what its rank 0 measured."""
    arguments = ["--stack", stack, "--rounds", str(options.rounds), "--steps", str(options.steps)]
    return result_of([*command, str(WORKER), *arguments, "--result"], DEADLINE)


def stock_python():
    """The interpreter of an environment with stock Horovod on Keras 2, made once."""
    python = STOCK_FOLDER / "bin" / "python"
    finished = STOCK_FOLDER / ".finished"
    if not finished.exists():
        if sys.version_info >= (3, 12):
            sys.exit("--stock needs Python 3.10 or 3.11: TensorFlow 2.15 exists for no later one.")
        print(
            "making an environment with TensorFlow 2.15 and stock Horovod; takes minutes, once ...",
            flush=True,
        )
        venv.create(STOCK_FOLDER, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        tools = [
            "setuptools<70",
            "wheel",
            "packaging",
            "psutil",
            "cloudpickle",
            "pyyaml",
            "cmake<4",
            "numpy<2",
        ]
        subprocess.run([*pip, "tensorflow==2.15.1", *tools], check=True)
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(
            [*pip, "--no-build-isolation", "--no-cache-dir", "horovod==0.28.1"],
            check=True,
            env=os.environ | STOCK_BUILD | {"PATH": path},
        )
        finished.touch()
    return python


if __name__ == "__main__":
    main()
