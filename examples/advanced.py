"""Warm-up, decay, augmentation, checkpoints and resuming, with Keras' own callbacks acting as one process.

    horovodrun -np 2 python examples/advanced.py --epochs 12
    horovodrun -np 2 python examples/advanced.py --epochs 16     # goes on where the first run stopped

Only rank 0 writes: the best model, the state to resume from and TensorBoard's log, all below --output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import keras
import tensorflow as tf

import hvdext as hvd

BATCH = 16


def main():
    options = parse_arguments()
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())  # dropout and augmentation differ between ranks
    train, test = datasets.load("digits")
    images = hvd.data.shard(*train, batch_size=BATCH, seed=0).map(shifted)
    tested = tuple(array[hvd.rank() :: hvd.size()] for array in test)

    model = build_model(train[0].shape[1:])
    rate = 0.02 * hvd.size()
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.SGD(rate, momentum=0.9)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        images,
        epochs=options.epochs,
        validation_data=tested,  # each rank its share; the logs are those of all images
        callbacks=callbacks(rate, options.output),
        verbose=hvd.verbose(2),
    )

    # The best of all epochs, from the one file that rank 0 has written.
    hvd.barrier()
    best = keras.models.load_model(options.output / "best.keras")
    _, accuracy = best.evaluate(*test, verbose=0)
    difference = hvd.largest_difference(model.trainable_variables)
    if hvd.rank() == 0:
        written = ", ".join(sorted(path.name for path in options.output.iterdir()))
        print(f"written by rank 0: {written}")
        print(f"best model: test accuracy {accuracy:.4f}; largest difference between ranks {difference}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("output/advanced"))
    return parser.parse_args()


def callbacks(rate, output):
    return [
        hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
        # From rate / size up to rate over three epochs, then down in two stairs.
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=rate, warmup_epochs=3, verbose=1),
        hvd.callbacks.LearningRateScheduleCallback(
            rate, multiplier=lambda epoch: 1.0, start_epoch=3, end_epoch=8
        ),
        hvd.callbacks.LearningRateScheduleCallback(
            rate, multiplier=lambda epoch: 0.1, start_epoch=8, end_epoch=11
        ),
        hvd.callbacks.LearningRateScheduleCallback(rate, multiplier=lambda epoch: 0.01, start_epoch=11),
        hvd.callbacks.AsOneProcess(
            [
                keras.callbacks.BackupAndRestore(output / "resume", delete_checkpoint=False),
                keras.callbacks.ModelCheckpoint(
                    output / "best.keras", monitor="val_accuracy", save_best_only=True
                ),
                keras.callbacks.TensorBoard(output / "tensorboard"),
                keras.callbacks.EarlyStopping("val_loss", patience=6, restore_best_weights=True),
            ]
        ),
    ]


def build_model(shape):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(16, 3, use_bias=False),
            hvd.SyncBatchNormalization(),  # statistics over all ranks' batches
            keras.layers.ReLU(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.25),
            keras.layers.Dense(10),
        ]
    )


def shifted(images, labels):
    """Moves each batch by up to one pixel."""
    shift = tf.random.uniform([2], -1, 2, tf.int32)
    return tf.roll(images, shift, axis=[1, 2]), labels


if __name__ == "__main__":
    main()
