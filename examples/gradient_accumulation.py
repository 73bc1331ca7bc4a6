"""Large batches from small ones: gradients of several micro-batches, added up locally before one exchange.

    horovodrun -np 2 python examples/gradient_accumulation.py

The same model is trained twice, on the same images in the same order: with PASSES micro-batches of MICRO
images per update, and with one batch of PASSES * MICRO. The memory for activations is that of the
micro-batch, the exchange happens once per update, and the weights end up the same.
"""

from __future__ import annotations

import datasets
import keras
import numpy as np

import hvdext as hvd

EPOCHS, MICRO, PASSES = 4, 8, 4


def main():
    hvd.init()
    (x, y), test = datasets.load("digits")
    updates = len(x) // hvd.size() // (MICRO * PASSES)
    used = updates * MICRO * PASSES * hvd.size()
    x, y = (array[:used][hvd.rank() :: hvd.size()] for array in (x, y))

    small, sent_small = train(x, y, MICRO, backward_passes_per_step=PASSES, average_aggregated_gradients=True)
    large, sent_large = train(x, y, MICRO * PASSES)

    apart = max(np.abs(a - b).max() for a, b in zip(small.get_weights(), large.get_weights(), strict=True))
    _, accuracy = small.evaluate(*test, verbose=0)
    if hvd.rank() == 0:
        print(f"{PASSES} micro-batches of {MICRO}: {sent_small} exchanges")
        print(f"one batch of {PASSES * MICRO}: {sent_large} exchanges")
        print(f"largest difference between the two models: {apart:.1e}; test accuracy {accuracy:.4f}")


def train(x, y, batch, **options):
    """Returns the trained model and how many exchanges of gradients it took."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.2, momentum=0.9), **options)
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    before = exchanges()
    model.fit(
        x,
        y,
        batch,
        epochs=EPOCHS,
        shuffle=False,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0)],
        verbose=0,
    )
    return model, exchanges() - before


def exchanges():
    return hvd.traffic()["grad"].calls if "grad" in hvd.traffic() else 0


if __name__ == "__main__":
    main()
