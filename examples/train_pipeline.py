"""Trains one model whose layers are spread over the ranks.

    horovodrun -np 2 python examples/train_pipeline.py
    horovodrun -np 4 python examples/train_pipeline.py --schedule gpipe --data fashion-mnist --epochs 2
    horovodrun -np 2 python examples/train_pipeline.py --schedule interleaved
    horovodrun -np 4 python examples/train_pipeline.py --replicas 2    # two pipelines of two ranks
    python examples/train_pipeline.py                                  # one process: plain training

Each rank builds and trains its own part of a residual network on real images; a batch goes through the parts
in micro-batches. In the end the whole model is written as one file, which plain Keras opens.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import keras
import tensorflow as tf
from datasets import load

import hvdext as hvd

layers = keras.layers


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    hvd.init(process_sets="dynamic")
    train, test = load(options.data)
    keras.utils.set_random_seed(options.seed)

    # A function, not a model: no rank ever holds more than its own layers.
    builder = functools.partial(build_model, train[0].shape[1:])
    grid = hvd.Grid(data=options.replicas, pipeline=hvd.size() // options.replicas)
    stages = grid.shape.pipeline * (2 if options.schedule == "interleaved" else 1)
    plan = hvd.plan(builder, places=stages, balance="flops")
    model = hvd.pipeline(builder, plan, options.microbatches, options.schedule, grid=grid)

    with grid.data_parallel():  # gradients and images: over the pipelines, not over all ranks
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.Adam(options.learning_rate)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        images = hvd.data.shard(*train, batch_size=options.batch_size, seed=options.seed)
        model.fit(images, epochs=options.epochs, shuffle=False, verbose=2 * hvd.verbose())
    loss, accuracy = model.evaluate(*test, batch_size=options.batch_size, verbose=0)

    path = options.output / "pipeline.keras"
    options.output.mkdir(parents=True, exist_ok=True)
    model.save(path)  # on every rank; the first one writes

    weights = hvd.allgather_object(model.count_params())
    if hvd.rank() == 0:
        print(plan)
        print(f"weights by rank: {weights}")
        print(f"test accuracy {accuracy:.4f}, loss {loss:.4f}")
        whole = keras.models.load_model(path)
        _, again = whole.evaluate(*test, batch_size=options.batch_size, verbose=0)
        print(f"the file, {whole.count_params()} weights, in plain Keras: test accuracy {again:.4f}")


def build_model(shape):
    """A residual network for small images; returns logits."""
    images = keras.Input(shape, name="images")
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="first")(images)
    for block in range(4):
        y = layers.BatchNormalization(momentum=0.9, name=f"norm_{block}")(x)
        y = layers.Conv2D(16, 3, padding="same", activation="relu", name=f"convolution_{block}")(y)
        x = layers.Add(name=f"add_{block}")([x, y])
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(64, activation="relu", name="hidden")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    return keras.Model(images, layers.Dense(10, name="logits")(x), name="residual")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "eager-1f1b", "interleaved"), default="1f1b")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=1, help="pipelines side by side; divides the ranks")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="per pipeline; divisible by the micro-batches"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of TensorFlow, per rank")
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
