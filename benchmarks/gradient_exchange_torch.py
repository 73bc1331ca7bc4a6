"""One rank of gradient_exchange.py on PyTorch: the same model, with DDP on Gloo and without."""

from __future__ import annotations

import json
import os
import time

import torch
from measuring import take_core, worker_parser
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

BATCH = 32
EPOCHS = 3  # per measurement; the first is not counted


def main():
    options = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo")
    take_core(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    models = {"plain": model(), "exchange": DistributedDataParallel(model())}
    batches = [(torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))) for _ in range(32)]
    results = {kind: [] for kind in models}
    for _ in range(options.rounds + 1):
        for kind, each in models.items():
            distributed.barrier()
            results[kind].append(images_per_second(each, batches, options.steps))
    if distributed.get_rank() == 0:
        options.result.write_text(json.dumps({kind: speeds[1:] for kind, speeds in results.items()}))
    distributed.barrier()
    os._exit(0)  # torch's threads make an orderly end abort at times


def parse_arguments():
    parser = worker_parser()
    parser.add_argument("--steps", type=int, required=True)
    return parser.parse_args()


def model():
    made = nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    assert sum(parameter.numel() for parameter in made.parameters()) == 420_042
    return made


def images_per_second(net, batches, steps):
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    lose = nn.CrossEntropyLoss()
    for epoch in range(EPOCHS):
        if epoch == 1:
            start = time.perf_counter()
        for step in range(steps):
            images, labels = batches[step % len(batches)]
            optimizer.zero_grad()
            lose(net(images), labels).backward()
            optimizer.step()
    return BATCH * steps * (EPOCHS - 1) / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
