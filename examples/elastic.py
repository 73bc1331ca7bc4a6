r"""Training that goes on when a rank is lost, and takes in ranks that come.

With a fixed number of ranks:

    horovodrun -np 2 python examples/elastic.py

Elastic, on one machine (`discover.sh` prints the hosts that are there, one `host:slots` a line):

    printf '#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n' > discover.sh; chmod +x discover.sh
    horovodrun -np 2 --min-np 1 --max-np 2 --network-interface lo --host-discovery-script ./discover.sh \
        python examples/elastic.py

Then kill one of the two processes, and the other one goes on from its last commit.
"""

from __future__ import annotations

import datasets
import keras

import hvdext as hvd

EPOCHS, BATCH = 8, 32
RATE = 0.002  # for one rank


def make_model(shape):
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(RATE * hvd.size()))
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return model


def main():
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    training, test = datasets.load("digits")
    model = make_model(training[0].shape[1:])
    state = hvd.elastic.KerasState(model, epoch=0, batch=0)

    def rescale():
        print(f"now {hvd.size()} ranks; going on in epoch {state.epoch + 1} after {state.batch} batches")
        model.optimizer.learning_rate = RATE * hvd.size()

    state.register_reset_callbacks([rescale])

    @hvd.elastic.run
    def train(state):
        # What depends on rank or size is made here, anew for every number of ranks.
        images = hvd.data.shard(*training, batch_size=BATCH)
        images.set_epoch(state.epoch)
        model.fit(
            images,
            epochs=EPOCHS,
            initial_epoch=state.epoch,
            verbose=hvd.verbose(2),
            callbacks=[
                hvd.elastic.UpdateBatchStateCallback(state),
                hvd.elastic.UpdateEpochStateCallback(state),
                hvd.elastic.CommitStateCallback(state, batches_per_commit=10),
                hvd.callbacks.MetricAverageCallback(),
            ],
        )

    train(state)
    accuracy = model.evaluate(*test, verbose=0)[1]
    difference = hvd.largest_difference(model.weights)
    if hvd.rank() == 0:
        print(f"{state.epoch} epochs; test accuracy {accuracy:.4f}")
        print(f"largest difference between ranks {difference}")


if __name__ == "__main__":
    main()
