"""One rank of latency.py; runs on hvdext and on PyTorch."""

from __future__ import annotations

import json
import os
import time

from latency import SIZES
from measuring import take_core, worker_parser

IDLE = 3.0  # seconds


def main():
    options = parse_arguments()
    on_torch = options.stack == "torch"
    allreduces, barrier, rank = of_torch() if on_torch else of_hvdext()
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if on_torch else ("HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
    take_core(*(int(os.environ[name]) for name in names))
    results = {}
    for what, (numbers, times) in SIZES.items():
        reduce = allreduces(numbers)
        reduce(3)
        for _ in range(options.rounds):
            barrier()
            start = time.perf_counter()
            reduce(times)
            results.setdefault(what, []).append((time.perf_counter() - start) / times)
    if options.stack == "hvdext":
        barrier()
        time.sleep(0.5)
        start = time.process_time()
        time.sleep(IDLE)
        results["idle"] = [(time.process_time() - start) / IDLE]
    barrier()
    if rank == 0:
        options.result.write_text(json.dumps(results))
    if on_torch:
        barrier()
        os._exit(0)  # torch's threads make an orderly end abort at times


def parse_arguments():
    parser = worker_parser()
    parser.add_argument("--stack", choices=["hvdext", "torch"], required=True)
    return parser.parse_args()


def of_hvdext():
    """Makes functions that reduce so many numbers so many times; a barrier; this rank."""
    import tensorflow as tf

    import hvdext as hvd

    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()

    def allreduces(numbers):
        @tf.function
        def reduce(times):
            total = tf.ones([numbers])
            for _ in tf.range(times):
                total = hvd.allreduce(total, name=f"latency.{numbers}")
            return total[0]

        return lambda times: reduce(tf.constant(times)).numpy()

    return allreduces, hvd.barrier, hvd.rank()


def of_torch():
    """As `of_hvdext`."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")

    def allreduces(numbers):
        total = torch.ones(numbers)

        def reduce(times):
            for _ in range(times):
                distributed.all_reduce(total)

        return reduce

    return allreduces, distributed.barrier, distributed.get_rank()


if __name__ == "__main__":
    main()
