"""Every rank trains alone on its share; at the end all agree on one model, better than most of theirs.

    horovodrun -np 4 python examples/consensus.py
    horovodrun -np 4 python examples/consensus.py --interrupt-after 100

Ranks begin with the same weights and exchange none until they have finished. Then these are averaged,
weighted by the samples that each rank has trained on. The second line sends Ctrl-C to the last rank after 100
batches: all of them stop together, and end with the same weights as well.
"""

from __future__ import annotations

import argparse
import os
import signal

import datasets
import keras
import numpy as np

import hvdext as hvd

EPOCHS, BATCH, RATE = 20, 16, 0.1


class Interrupt(keras.callbacks.Callback):
    """Presses Ctrl-C."""

    def __init__(self, after):
        super().__init__()
        self.batches_left = after

    def on_train_batch_end(self, batch, logs=None):
        self.batches_left -= 1
        if self.batches_left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--interrupt-after", type=int, metavar="BATCHES")
    interrupt_after = parser.parse_args().interrupt_after

    hvd.init()
    train, test = datasets.load("digits")
    x, y = (share_of(array, hvd.rank(), hvd.size()) for array in train)
    keras.utils.set_random_seed(hvd.rank())  # every rank its own order of images
    model = make_model(x.shape[1:])
    hvd.broadcast_variables(model.variables, root_rank=0)

    consensus = hvd.callbacks.ConsensusAveraging(evaluate=test, verbose=0)
    callbacks = [consensus]
    if interrupt_after and hvd.rank() == hvd.size() - 1:
        callbacks.insert(0, Interrupt(interrupt_after))
    model.fit(x, y, BATCH, EPOCHS, callbacks=callbacks, verbose=0)

    difference = hvd.largest_difference(model.weights)
    if hvd.rank() == 0:
        report = consensus.report
        before = [metrics["accuracy"] for metrics in report.metrics_before]
        after = report.metrics_after[0]["accuracy"]
        print(f"ended by an interrupt: {consensus.interrupted}; samples by rank: {list(report.samples)}")
        print(f"test accuracy by rank: {', '.join(f'{accuracy:.4f}' for accuracy in before)}")
        print(f"test accuracy, mean of the ranks: {np.mean(before):.4f}; of their consensus: {after:.4f}")
        mean, largest = report.mean_distance, report.largest_distance
        print(f"the ranks' weights were {mean:.3f} away from it on average, {largest:.3f} at most")
        print(f"largest difference between ranks {difference}")


def share_of(array, rank, size):
    """The first rank gets the most, the last one the least: 4, 3, 2 and 1 of 10 parts."""
    cuts = np.cumsum([0, *range(size, 0, -1)]) * len(array) // (size * (size + 1) // 2)
    return array[cuts[rank] : cuts[rank + 1]]


def make_model(shape):
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss, metrics=["accuracy"])
    return model


if __name__ == "__main__":
    main()
