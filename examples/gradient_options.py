"""The options of DistributedOptimizer side by side: what each sends, and how well the model learns.

    horovodrun -np 4 python examples/gradient_options.py

Every row trains the same model from the same weights on the same share of the digits. "sent" is what one rank
sends per epoch for gradients; "apart" the largest difference between the weights of any two ranks at the end.
"""

from __future__ import annotations

import datasets
import keras
import tensorflow as tf

import hvdext as hvd

EPOCHS, BATCH = 6, 16

OPTIONS = {
    "average": {},
    "sum, learning rate / size": {"op": hvd.Sum},
    "adasum": {"op": hvd.Adasum},
    "float16 on the wire": {"compression": hvd.Compression.fp16},
    "2 micro-batches per update": {"backward_passes_per_step": 2, "average_aggregated_gradients": True},
    "weighed by samples": {"weight_by": "samples"},
    "kernels only, biases local": {"select": "*/kernel"},
    "within pairs of ranks": {"process_set": "my pair"},
}


def main():
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.get_logger().setLevel("ERROR")
    hvd.init(process_sets="dynamic")
    if hvd.size() & (hvd.size() - 1):
        raise SystemExit(f"Adasum and the pairs need a power-of-two number of ranks. Received: {hvd.size()}.")
    pairs = [hvd.add_process_set([r, r + 1]) for r in range(0, hvd.size() - 1, 2) if hvd.size() > 2]
    my_pair = next((pair for pair in pairs if pair.included()), None)
    train, test = datasets.load("digits")
    images = hvd.data.shard(*train, batch_size=BATCH)
    if hvd.rank() == 0:
        print(f"{'option':28s} {'accuracy':>8s} {'updates':>8s} {'sent':>10s} {'apart':>9s}")
    for label, options in OPTIONS.items():
        options = options | ({"process_set": my_pair} if "process_set" in options else {})
        accuracy, updates, sent, apart = train_with(options, images, test)
        if hvd.rank() == 0:
            print(f"{label:28s} {accuracy:8.4f} {updates:8d} {sent / 1024:7.0f} KiB {apart:9.2g}", flush=True)


def train_with(options, images, test):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    learning_rate = 0.1 / (hvd.size() if options.get("op") is hvd.Sum else 1)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(learning_rate, momentum=0.9), **options)
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    before = gradient_bytes()
    model.fit(
        images,
        epochs=EPOCHS,
        shuffle=False,  # the shard has shuffled already
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
        verbose=0,
    )
    sent = (gradient_bytes() - before) / EPOCHS
    _, accuracy = model.evaluate(*test, verbose=0)
    return accuracy, int(optimizer.iterations), sent, hvd.largest_difference(model.variables)


def gradient_bytes():
    traffic = hvd.traffic()
    return traffic["grad"].bytes if "grad" in traffic else 0


if __name__ == "__main__":
    main()
