"""Local SGD with a monitor: how far the ranks drift apart, what exchanging their weights costs and saves.

    horovodrun -np 4 python examples/sync_monitor.py
    horovodrun -np 4 python examples/sync_monitor.py --every 32 --delay 4
    tensorboard --logdir output/sync_monitor/tensorboard

Each rank trains on its own share of the images, and all take their mean every few steps. Below --output are
a picture, TensorBoard's log and a table with one line per epoch, all by rank 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import keras
import tensorflow as tf

import hvdext as hvd


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    keras.utils.set_random_seed(0)  # the same initial weights on all ranks
    train, test = datasets.load("digits")
    model = build_model(train[0].shape[1:])
    model.compile(
        keras.optimizers.SGD(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    history = model.fit(
        hvd.data.shard(*train, batch_size=16, seed=0),
        epochs=options.epochs,
        callbacks=[
            hvd.sync.LocalSGD(every=options.every, delay=options.delay),
            hvd.callbacks.SyncMonitor(plot=output / "sync.png", tensorboard=output / "tensorboard"),
            hvd.callbacks.AsOneProcess([keras.callbacks.CSVLogger(output / "epochs.csv")]),
            hvd.callbacks.ConsensusAveraging(verbose=0),  # the last steps' differences go, too
        ],
        verbose=0,
    )
    _, accuracy = model.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.weights)
    if hvd.rank() == 0:
        report(history.history, accuracy, difference)
        print(f"picture, TensorBoard's log and table: {output}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--every", type=int, default=8, help="steps between two exchanges")
    parser.add_argument("--delay", type=int, default=0, help="steps that an exchange may take")
    parser.add_argument("--output", type=Path, default=Path("output/sync_monitor"))
    return parser.parse_args()


def build_model(shape):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, activation="relu", name="convolution"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="classes"),
        ]
    )


def report(history, accuracy, difference):
    print("epoch   distance to the mean   waiting   noise scale      sent     saved")
    for i, distance in enumerate(history["sync/divergence"]):
        waiting, noise = history["sync/share_waiting"][i], history["sync/noise_scale"][i]
        sent, saved = history["sync/bytes_sent"][i] / 1e6, history["sync/bytes_saved"][i] / 1e6
        line = f"{i + 1:5d}   {distance:20.4f}   {waiting:7.1%}   {noise:11.0f}"
        print(f"{line}   {sent:4.1f} MB   {saved:4.1f} MB")
    print(f"test accuracy {accuracy:.4f}; largest difference between ranks {difference}")


if __name__ == "__main__":
    main()
