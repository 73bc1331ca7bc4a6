"""Ranks search for better initial weights together before they train.

    horovodrun -np 4 python examples/warmup.py
    horovodrun -np 4 python examples/warmup.py --unify average

Every rank but the first puts noise on half of its initial weights, and each scores what it has on the same
images. The best weights (or the mean, the better ones weighing more) go to all, and the next round begins
with them.
"""

from __future__ import annotations

import argparse

import datasets
import keras

import hvdext as hvd

EPOCHS, BATCH = 4, 32


def main():
    arguments = parse_arguments()
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())  # other weights on every rank, the same in every run
    train, test = datasets.load("digits")
    length = len(train[0]) // hvd.size()
    x, y = (array[hvd.rank() :: hvd.size()][:length] for array in train)

    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.001 * hvd.size()))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])

    warmup = hvd.callbacks.WarmupPerturbation(
        fraction=0.5,
        scale=0.5,
        unify=arguments.unify,
        weight_by="score" if arguments.unify == "average" else None,
        probe=(x[:256], y[:256]),  # the first rank's is sent to all
        rounds=arguments.rounds,
    )
    model.fit(x, y, BATCH, epochs=EPOCHS, callbacks=[warmup], verbose=hvd.verbose(2))

    _, accuracy = model.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.trainable_variables)
    if hvd.rank() == 0:
        first, last = warmup.scores[0][0], min(warmup.scores[-1])
        print(f"loss of the first rank's initial weights {first:.4f}, of the last round's best {last:.4f}")
        print(f"test accuracy {accuracy:.4f}; largest difference between ranks {difference}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unify", choices=["best", "average", "root"], default="best")
    parser.add_argument("--rounds", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
