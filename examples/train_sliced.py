"""One transformer whose layers are cut across ranks, on real data; then the whole of it in plain Keras.

    horovodrun -np 2 python examples/train_sliced.py               # two slices of every layer
    horovodrun -np 4 python examples/train_sliced.py               # two such pairs, each with half of a batch
    horovodrun -np 2 python examples/train_sliced.py --data fashion-mnist --width 64 --epochs 2
    python examples/train_sliced.py                                # one process: the same script, no launcher

The rows of an image are the tokens of a small vision transformer. With two slices a rank has half of the
attention heads, half of the hidden units of the MLPs and half of the classes; together the ranks compute what
the whole model does. The last line says how far they end from it, trained in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import keras
import numpy as np
import tensorflow as tf

import hvdext as hvd

# Patterns on layers' paths. An up and its down exchange once, in the down; so does attention by itself.
RULES = {
    "attention_*": "heads",
    "up_*": "column",
    "down_*": "row",
    "classes": "vocabulary",  # the logits stay cut, too: the loss below does without gathering them
}


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init(process_sets="dynamic")
    # Ranks beyond the slices share the batch: data parallelism.
    grid = hvd.Grid(slices=options.slices or min(2, hvd.size()))
    train, test = datasets.load(options.data)
    keras.utils.set_random_seed(options.seed)  # layers that are not cut must start alike

    with grid.data_parallel():
        # The builder, not the model: no rank ever holds all weights.
        model = hvd.slice_layers(lambda: build_model(train[0].shape[1:-1], options), RULES)
        model.compile(
            hvd.DistributedOptimizer(keras.optimizers.AdamW(options.learning_rate, global_clipnorm=1.0)),
            hvd.SlicedSparseCategoricalCrossentropy(),
            metrics=[hvd.SlicedSparseCategoricalAccuracy()],
        )
        # Ranks with different slices get the same samples, ranks with the same slices different ones.
        data = hvd.data.shard(
            *train, batch_size=options.batch_size // grid.data.size, shuffle=False, seed=options.seed
        )
        model.fit(
            data,
            epochs=options.epochs,
            shuffle=False,
            validation_data=test,
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                hvd.callbacks.MetricAverageCallback(),
            ],
            verbose=hvd.verbose(2),
        )
        path = options.output / "sliced.keras"
        if hvd.verbose():
            options.output.mkdir(parents=True, exist_ok=True)
        hvd.save_uncut(model, path)
    report(model, path, grid, train, test, options)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--slices", type=int, help="default: 2, in one process 1")
    parser.add_argument("--width", type=int, default=32, help="features of a token")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step, of all ranks together")
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args()


def build_model(shape, options):
    """A vision transformer of plain Keras: nothing here knows of slices."""
    layers = keras.layers
    inputs = keras.Input((*shape, 1))
    x = layers.Dense(options.width, name="embed")(layers.Reshape(shape)(inputs))
    for i in range(options.layers):
        y = layers.LayerNormalization(name=f"norm_{i}a")(x)
        y = layers.MultiHeadAttention(4, options.width // 4, name=f"attention_{i}")(y, y)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization(name=f"norm_{i}b")(x)
        y = layers.Dense(4 * options.width, activation="gelu", name=f"up_{i}")(y)
        x = layers.Add()([x, layers.Dense(options.width, name=f"down_{i}")(y)])
    x = layers.Flatten()(layers.LayerNormalization(name="norm")(x))
    return keras.Model(inputs, layers.Dense(10, name="classes")(x), name="vision_transformer")


def report(model, path, grid, train, test, options):
    """Rank 0 opens the saved model in plain Keras, and trains the same one by itself to compare."""
    parameters = hvd.allgather_object(model.count_params())
    sent = hvd.traffic().get("slices")
    if hvd.rank() != 0:
        return
    whole = keras.models.load_model(path)
    logits = whole.predict(test[0], verbose=0)
    print(f"\n{grid}: {parameters} parameters by rank, {whole.count_params()} in the whole model")
    if sent is not None:
        print(f"exchanged between slices: {sent.calls} messages, {sent.bytes / 2**20:.1f} MiB from this rank")
    print(f"opened in plain Keras: test accuracy {np.mean(logits.argmax(-1) == test[1]):.4f}; {path}")

    keras.utils.set_random_seed(options.seed)
    alone = build_model(train[0].shape[1:-1], options)
    alone.compile(
        keras.optimizers.AdamW(options.learning_rate, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    steps = len(train[0]) // options.batch_size * options.batch_size
    alone.fit(
        train[0][:steps],
        train[1][:steps],
        batch_size=options.batch_size,
        epochs=options.epochs,
        shuffle=False,
        verbose=0,
    )
    apart = np.abs(logits - alone.predict(test[0], verbose=0)).max()
    print(f"largest difference between its logits and those of one process: {apart:.2g}")


if __name__ == "__main__":
    main()
