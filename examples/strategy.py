"""A training whose whole distributed set-up is one file: swap the file, not the script.

    horovodrun -np 2 python examples/strategy.py --strategy examples/strategies/diloco.yaml

The same script trains with every file in examples/strategies.
"""

from __future__ import annotations

import argparse

import datasets
import keras
import tensorflow as tf

import hvdext as hvd


def main():
    arguments = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")
    strategy = hvd.Strategy.load(arguments.strategy)
    hvd.init(process_sets=strategy.process_sets)
    train, test = datasets.load("digits")
    # Each rank trains on a share of its own, all of one length: ranks make equally many steps.
    length = len(train[0]) // hvd.size()
    x, y = (array[hvd.rank() :: hvd.size()][:length] for array in train)

    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    # Some files bring their optimizer along.
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9) if strategy.optimizer is None else None
    strategy.compile(
        model, optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    model.fit(
        x,
        y,
        batch_size=16,
        epochs=arguments.epochs,
        callbacks=strategy.callbacks(),
        verbose=hvd.verbose(2),
    )

    _, accuracy = model.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.trainable_variables)
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}; largest difference between ranks {difference}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--strategy", required=True, help="a YAML file, such as those in examples/strategies")
    parser.add_argument("--epochs", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
