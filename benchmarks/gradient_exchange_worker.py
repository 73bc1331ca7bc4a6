"""One rank of gradient_exchange.py; runs on hvdext with Keras 3 and on stock Horovod with Keras 2."""

from __future__ import annotations

import json
import time

import numpy as np
import tensorflow as tf
from measuring import bytes_sent, take_core, worker_parser
from tensorflow import keras

BATCH = 32
EPOCHS = 3  # per measurement; the first is not counted


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    if options.stack == "hvdext":
        import hvdext as hvd
    else:
        import horovod.tensorflow.keras as hvd
    hvd.init()
    take_core(hvd.local_rank(), hvd.local_size())
    keras.utils.set_random_seed(0)  # all ranks start alike
    models = {"plain": compiled(lambda optimizer: optimizer), "exchange": compiled(hvd.DistributedOptimizer)}
    images = dataset()
    results = {kind: [] for kind in models}
    wire = []
    for _ in range(options.rounds + 1):
        for kind, model in models.items():
            hvd.allgather(tf.zeros([1])) if options.stack == "stock" else hvd.barrier()
            before = bytes_sent("lo")
            results[kind].append(images_per_second(model, images, options.steps))
            if kind == "exchange":
                wire.append((bytes_sent("lo") - before) / (EPOCHS * options.steps * hvd.size()))
    if hvd.rank() == 0:
        measured = {kind: speeds[1:] for kind, speeds in results.items()}  # the first round compiles
        measured["wire_bytes"] = float(np.median(wire[1:]))
        measured["gradient_bytes"] = 4 * models["plain"].count_params()
        options.result.write_text(json.dumps(measured))


def parse_arguments():
    parser = worker_parser()
    parser.add_argument("--stack", choices=["hvdext", "stock"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    return parser.parse_args()


def compiled(distribute):
    model = keras.Sequential(
        [
            keras.layers.InputLayer((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(512, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    assert model.count_params() == 420_042
    optimizer = distribute(keras.optimizers.SGD(0.01, momentum=0.9))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def dataset():
    generator = np.random.default_rng(0)
    images = generator.random((32 * BATCH, 28, 28, 1), np.float32)
    labels = generator.integers(0, 10, len(images))
    return (
        tf.data.Dataset.from_tensor_slices((images, labels))
        .batch(BATCH, drop_remainder=True)
        .cache()
        .repeat()
    )


def images_per_second(model, images, steps):
    times = EpochTimes()
    model.fit(images, steps_per_epoch=steps, epochs=EPOCHS, callbacks=[times], verbose=0)
    return BATCH * steps * (EPOCHS - 1) / sum(times.seconds[1:])


class EpochTimes(keras.callbacks.Callback):
    """Seconds per epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self._start)


if __name__ == "__main__":
    main()
