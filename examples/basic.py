"""The plainest script: what Horovod's users know, with one line changed.

horovodrun -np 2 python examples/basic.py
"""

from __future__ import annotations

import datasets
import keras

import hvdext as hvd  # was: import horovod.tensorflow.keras as hvd

EPOCHS, BATCH = 8, 32


def main():
    hvd.init()
    train, test = datasets.load("digits")
    # Each rank trains on a share of its own, all of one length: ranks make equally many steps. For shares of
    # any length see uneven_batches.py; for a new deal every epoch, hvd.data.shard in train.py.
    length = len(train[0]) // hvd.size()
    x, y = (array[hvd.rank() :: hvd.size()][:length] for array in train)

    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.25),
            keras.layers.Dense(10),
        ]
    )
    # The batch is size() times as large as one rank's, and so is the learning rate.
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.001 * hvd.size()))
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )

    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.001 * hvd.size(), warmup_epochs=2),
    ]
    if hvd.rank() == 0:
        print(f"{hvd.size()} ranks, {len(x)} of {len(train[0])} images each")
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        callbacks=callbacks,
        verbose=hvd.verbose(2),
    )

    _, accuracy = model.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.trainable_variables)
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}; largest difference between ranks {difference}")


if __name__ == "__main__":
    main()
