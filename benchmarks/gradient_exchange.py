"""What the gradient exchange costs.

    python benchmarks/gradient_exchange.py           # size-1 overhead, 2-rank throughput, bytes sent
    python benchmarks/gradient_exchange.py --sockets # beside the same engine without shared memory
    python benchmarks/gradient_exchange.py --stock   # beside stock Horovod 0.28.1 on Keras 2 (built once)
    python benchmarks/gradient_exchange.py --torch   # beside PyTorch's DDP on Gloo (installed once)

The model is a CNN of 420,042 parameters on 28x28 images, batch size 32 per rank, SGD with momentum, trained
with `model.fit`, one TensorFlow thread per rank, each rank on a core of its own if there are enough.
Throughput does not depend on what the images show; they are random.

- Overhead at size 1: time per step with `DistributedOptimizer` over plain Keras, in one process, in turn.
- Throughput: images/s per rank with exchange over images/s without, in the same processes, in turn. Runs of
  what is compared alternate. With --stock, the same script runs on TensorFlow 2.15 with Horovod as published.
  With --torch the model is written in PyTorch, and its loop is a plain Python loop over a list of batches.
- Bytes: what went over the loopback device of a network namespace of its own, headers and control messages
  included, over 2(n-1)/n of the gradients' bytes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from environments import stock_python, torch_python
from measuring import figure, horovodrun, print_load, result_of

HERE = Path(__file__).resolve().parent
WORKER = HERE / "gradient_exchange_worker.py"
TORCH_WORKER = HERE / "gradient_exchange_torch.py"
DEADLINE = 600  # seconds per run


def main():
    options = parse_arguments()
    overhead(options)
    described = {"hvdext": Stack(Path(sys.executable))}
    if options.sockets:
        described["sockets"] = Stack(Path(sys.executable), {"HVDEXT_LOCAL": "0"})
    if options.stock:
        described["stock"] = Stack(stock_python())
    if options.torch:
        described["torch"] = Stack(torch_python())
    ratios = throughput(described, options)
    for name in ratios.keys() - {"hvdext"}:
        figure(f"hvdext's ratio over that of {name}", [ratios["hvdext"] / ratios[name]], "ratio", 2)
    print_load()
    bytes_on_the_wire(options)


@dataclass(frozen=True)
class Stack:
    """What trains the model.

    Attributes:
        python: the interpreter of its environment.
        env: variables for its ranks.
    """

    python: Path
    env: dict[str, str] = field(default_factory=dict)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launches", type=int, default=3, help="runs of each stack, in turn")
    parser.add_argument("--rounds", type=int, default=7, help="measurements within a run")
    parser.add_argument("--steps", type=int, default=150, help="training steps per measurement")
    parser.add_argument("--sockets", action="store_true", help="also without shared memory")
    parser.add_argument("--stock", action="store_true", help="also stock Horovod on Keras 2")
    parser.add_argument("--torch", action="store_true", help="also PyTorch's DDP on Gloo")
    return parser.parse_args()


def overhead(options):
    """Size-1 step time with DistributedOptimizer over plain Keras."""
    alone = Stack(Path(sys.executable))
    results = [run([sys.executable, str(WORKER)], "hvdext", alone, options) for _ in range(options.launches)]
    pairs = [pair for result in results for pair in zip(result["plain"], result["exchange"], strict=True)]
    figure("step of one rank over plain Keras", [plain / exchange for plain, exchange in pairs], "ratio")


def throughput(stacks, options):
    """Images/s with exchange over images/s without, for each stack; runs of the stacks alternate."""
    results = {name: {"plain": [], "exchange": []} for name in stacks}
    for _ in range(options.launches):
        for name, stack in stacks.items():
            result = run(ranks_of(name, stack, options.ranks), name, stack, options)
            for kind, speeds in results[name].items():
                speeds += result[kind]
    ratios = {}
    for name, speeds in results.items():
        plain, exchange = speeds["plain"], speeds["exchange"]
        title = f"{name}, {options.ranks} ranks"
        figure(f"{title}, per rank, without exchange", plain, "images/s", 0)
        figure(f"{title}, per rank, with exchange", exchange, "images/s", 0)
        each = [e / p for e, p in zip(exchange, plain, strict=True)]
        ratios[name] = figure(f"{title}, with over without", each, "ratio")
    return ratios


def bytes_on_the_wire(options):
    """Bytes per rank and step over loopback, over the least a ring needs."""
    unshare = shutil.which("unshare")
    script = 'ip link set lo up && exec "$@"'
    isolated = [unshare, "--net", "--map-root-user", "sh", "-c", script, "sh"]
    if not unshare or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        print("bytes: skipped; no network namespace can be made here (needs unshare and ip)")
        return
    sockets = Stack(Path(sys.executable), {"HVDEXT_LOCAL": "0"})
    command = [*isolated, *ranks_of("hvdext", sockets, options.ranks, "--network-interfaces", "lo")]
    result = run(command, "hvdext", sockets, options)
    least = 2 * (options.ranks - 1) / options.ranks * result["gradient_bytes"]
    wire = result["wire_bytes"]
    figure("bytes on the wire over 2(n-1)/n of the gradients' bytes", [wire / least], "ratio")


def ranks_of(name, stack, ranks, *options):
    """The command that starts the ranks of a stack."""
    if name == "torch":
        together = [str(stack.python), "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        return [*together, str(TORCH_WORKER)]
    return [*horovodrun(ranks, *options, python=stack.python), str(WORKER)]


def run(command, name, stack, options):
    """Runs the worker and returns what its rank 0 measured."""
    kind = "stock" if name == "stock" else "hvdext"
    arguments = [] if name == "torch" else ["--stack", kind]
    arguments += ["--rounds", str(options.rounds), "--steps", str(options.steps), "--result"]
    return result_of([*command, *arguments], DEADLINE, stack.env)


if __name__ == "__main__":
    main()
