"""Shares of different lengths: every rank trains on all it has, and none waits for ever.

    horovodrun -np 2 python examples/uneven_batches.py

Rank 0 holds two thirds of the images, the others share the rest. A rank that has finished its epoch goes on
taking part in the others' updates, with nothing of its own to add.
"""

from __future__ import annotations

import datasets
import keras
import numpy as np

import hvdext as hvd

EPOCHS, BATCH = 6, 16


def main():
    hvd.init()
    train, test = datasets.load("digits")
    x, y = (share_of(array, hvd.rank(), hvd.size()) for array in train)
    tested = tuple(share_of(array, hvd.rank(), hvd.size()) for array in test)

    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.Adam(0.003)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x,
        y,
        BATCH,
        epochs=EPOCHS,
        validation_data=tested,  # uneven as well; the logs are exact all the same
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
            hvd.callbacks.UnevenBatches(),
            hvd.callbacks.MetricAverageCallback(),
        ],
        verbose=0,
    )

    _, accuracy = model.evaluate(*test, verbose=0)  # all test images in one process
    batches = hvd.allgather_object(-(-len(x) // BATCH))
    difference = hvd.largest_difference(model.trainable_variables)
    if hvd.rank() == 0:
        print(f"batches per epoch, by rank: {batches}; updates: {int(model.optimizer.iterations)}")
        shared = history.history["val_accuracy"][-1]
        print(f"test accuracy over the shares: {shared:.6f}; in one process: {accuracy:.6f}")
        print(f"largest difference between ranks {difference}")


def share_of(array, rank, size):
    if size == 1:
        return array
    cuts = np.linspace(2 * len(array) // 3, len(array), size).astype(int)
    return array[: cuts[0]] if rank == 0 else array[cuts[rank - 1] : cuts[rank]]


if __name__ == "__main__":
    main()
