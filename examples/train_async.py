"""Trains together with a slow rank, without waiting: each rank at its own pace, the slow one with less data.

    horovodrun -np 4 python examples/train_async.py
    horovodrun -np 4 python examples/train_sync.py     # the same model, data and slow rank, step by step
    horovodrun -np 2 python examples/train_async.py --data fashion-mnist --epochs 1

Every rank trains on its own. Beside it, random pairs of ranks average their weights all the time. The batches
of an epoch go to whoever is ready for one, so that the slow rank (`--slow-rank`) gets fewer. In the end all
ranks take the mean of their weights.
"""

from __future__ import annotations

import warnings

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
        keras.optimizers.Adam(options.learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    # Pairs need an even number of ranks; in a ring, each averages with two neighbours.
    sync = hvd.sync.AsyncGossip(whom=hvd.sync.Ring() if hvd.size() % 2 else None)
    staleness = []
    sync.listen(lambda exchanged: staleness.append(exchanged.staleness))
    warnings.filterwarnings("ignore", "Your input ran out of data")  # this rank's share of an epoch has
    with hvd.data.shared_by_load(*train, batch_size=options.batch_size, seed=options.seed) as images:
        model.fit(
            images,
            epochs=options.epochs,
            shuffle=False,  # the data set shuffles by itself
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
                sync,
                rank_load,
                hvd.callbacks.ConsensusAveraging(evaluate=test),
            ],
            verbose=0,
        )

    print_table(rank_load, images.samples, options.batch_size, images.waited, staleness)
    _, accuracy = model.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.weights)
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}")
        print(f"largest difference between the weights of any two ranks: {difference}")


if __name__ == "__main__":
    main()
