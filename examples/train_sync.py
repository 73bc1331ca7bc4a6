"""Trains together with a slow rank, step by step: everybody waits for it.

    horovodrun -np 4 python examples/train_sync.py
    horovodrun -np 4 python examples/train_async.py    # the same model, data and slow rank without waiting
    horovodrun -np 2 python examples/train_sync.py --data fashion-mnist --epochs 1

Every rank computes gradients on its own share of the images and applies the mean of all. One rank
(`--slow-rank`) sleeps after each step, so that a step takes it `--slow-factor` times as long.
"""

from __future__ import annotations

import keras
import tensorflow as tf
from slow_rank import Load, parse_arguments, print_table, seconds_per_step
from train import build_model, load

import hvdext as hvd


def main():
    options = parse_arguments(__doc__)
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    hvd.init()
    train, test = load(options.data)
    keras.utils.set_random_seed(options.seed + hvd.rank())
    model = build_model(train[0].shape[1:])

    own = seconds_per_step(model, *train, options.batch_size)
    rank_load = Load(own * (options.slow_factor - 1) if hvd.rank() == options.slow_rank else 0.0)
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.Adam(options.learning_rate)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # Every rank gets the same number of batches, however long it takes for one.
    images = hvd.data.shard(*train, batch_size=options.batch_size, seed=options.seed)
    model.fit(
        images,
        epochs=options.epochs,
        shuffle=False,  # the data set shuffles by itself
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0), rank_load],
        verbose=0,
    )

    print_table(rank_load, images.num_samples * options.epochs, options.batch_size)
    _, accuracy = model.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.weights)
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}")
        print(f"largest difference between the weights of any two ranks: {difference}")


if __name__ == "__main__":
    main()
