"""Trains a small CNN on all ranks together, then on each rank alone, and compares.

    horovodrun -np 4 python examples/train.py
    horovodrun -np 2 python examples/train.py --data fashion-mnist --epochs 3
    python examples/train.py                     # one process: the same script, no launcher

Together, every rank computes gradients on its own quarter of each batch and all apply their mean: four ranks
with batch size 16 train as one process with batch size 64. Alone, a rank has only its quarter of the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import keras
import numpy as np
import tensorflow as tf

import hvdext as hvd


def main():
    options = parse_arguments()
    if options.threads:
        tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    hvd.init()
    train, test = load(options.data)
    keras.utils.set_random_seed(options.seed + hvd.rank())

    model = build_model(train[0].shape[1:])
    together = fit(model, train, test, options, distributed=True)
    difference = hvd.largest_difference(model.weights)

    alone = fit(build_model(train[0].shape[1:]), train, test, options, distributed=False)

    if hvd.rank() == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        plot(options.output / "train.png", options.data, together, alone)
        model.save(options.output / "model.keras")
        n = hvd.size()
        print(f"\n{n} ranks together: test accuracy {together['val_accuracy'][-1]:.4f}")
        print(
            f"each alone on 1/{n} of the images: test accuracy {alone['val_accuracy'][-1]:.4f} (mean of {n})"
        )
        print(f"curves: {options.output / 'train.png'}; model: {options.output / 'model.keras'}")
        print(f"largest difference between the weights of any two ranks: {difference}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16, help="images per rank and step")
    parser.add_argument("--learning-rate", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="TensorFlow threads per rank; 0: its default")
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args()


def load(name):
    """Loads the data on every rank; where it has to be downloaded, one rank per host goes first."""
    data = datasets.load(name) if hvd.local_rank() == 0 else None
    hvd.barrier()
    return data or datasets.load(name)


def build_model(shape):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.25),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def fit(model, train, test, options, distributed):
    """Trains `model` and returns, per epoch, the loss and accuracies averaged over the ranks."""
    optimizer = keras.optimizers.Adam(options.learning_rate)
    callbacks = [hvd.callbacks.MetricAverageCallback()]
    if distributed:
        optimizer = hvd.DistributedOptimizer(optimizer)
        callbacks.insert(0, hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0))
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    if distributed:
        # A fresh permutation of all images every epoch, dealt to the ranks.
        images = hvd.data.shard(*train, batch_size=options.batch_size, seed=options.seed)
        # Each rank tests its share; the averaged metric is exact.
        tested = tuple(array[hvd.rank() :: hvd.size()] for array in test)
    else:
        mine = hvd.data.samples_of_rank(len(train[0]), hvd.rank(), hvd.size())
        images = tf.data.Dataset.from_tensor_slices(tuple(array[mine] for array in train))
        images = images.shuffle(len(mine)).batch(options.batch_size)
        tested = test
    history = model.fit(
        images,
        epochs=options.epochs,
        shuffle=False,  # the data sets shuffle by themselves
        validation_data=tested,
        validation_batch_size=256,
        callbacks=callbacks,
        verbose=hvd.verbose() if distributed else 0,
    )
    return history.history


def plot(path, name, together, alone):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    n = hvd.size()
    for history, label, colour in [
        (together, f"{n} ranks together", "tab:blue"),
        (alone, f"one rank alone on 1/{n} (mean)", "tab:orange"),
    ]:
        epochs = np.arange(1, len(history["loss"]) + 1)
        left.plot(epochs, history["loss"], color=colour, label=label)
        right.plot(epochs, history["val_accuracy"], color=colour, label=label)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy")
    right.set_ylim(top=1.0)
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"Small CNN on {name}")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
