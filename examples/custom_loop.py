"""A training loop of one's own: the exchange happens in the gradient tape.

horovodrun -np 2 python examples/custom_loop.py
"""

from __future__ import annotations

import datasets
import keras
import tensorflow as tf

import hvdext as hvd

EPOCHS, BATCH = 8, 32


def main():
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    train, test = datasets.load("digits")
    images = hvd.data.shard(*train, batch_size=BATCH)

    model = keras.Sequential(
        [
            keras.Input(train[0].shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    optimizer = keras.optimizers.Adam(0.003)
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables(model.variables + optimizer.variables, root_rank=0)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def train_step(x, y):
        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            loss = loss_of(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)  # the mean over the ranks
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    for epoch in range(EPOCHS):
        losses = [train_step(x, y) for x, y in images]
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}")

    accuracy = keras.metrics.SparseCategoricalAccuracy()
    accuracy.update_state(test[1], model(test[0]))
    difference = hvd.largest_difference(model.variables)
    if hvd.rank() == 0:
        print(f"test accuracy {float(accuracy.result()):.4f}; largest difference between ranks {difference}")


if __name__ == "__main__":
    main()
