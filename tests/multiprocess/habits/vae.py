"""A variational autoencoder whose losses are means and sums of its own, tracked by its own metrics.

After https://keras.io/examples/generative/vae.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from tests.multiprocess.habits.way import weights_of

LATENT, BATCH, PIXELS = 2, 8, 12


class VAE(keras.Model):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data):
        x, epsilon = data
        with tf.GradientTape() as tape:
            mean, log_variance = self.encoder(x)
            z = mean + ops.exp(0.5 * log_variance) * epsilon
            losses = keras.losses.binary_crossentropy(x, self.decoder(z))
            reconstruction = ops.mean(losses * PIXELS)
            kl = -0.5 * (1 + log_variance - ops.square(mean) - ops.exp(log_variance))
            kl = ops.mean(ops.sum(kl, axis=1))
            total = reconstruction + kl
        gradients = tape.gradient(total, self.trainable_weights)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_weights, strict=True))
        self.total_loss_tracker.update_state(total)
        self.kl_loss_tracker.update_state(kl)
        return {"loss": self.total_loss_tracker.result(), "kl_loss": self.kl_loss_tracker.result()}


def main(way):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((PIXELS,))
    hidden = layers.Dense(8, activation="relu")(inputs)
    encoder = keras.Model(
        inputs, [layers.Dense(LATENT, name="mean")(hidden), layers.Dense(LATENT, name="log_variance")(hidden)]
    )
    decoder = keras.Sequential(
        [keras.Input((LATENT,)), layers.Dense(8, activation="relu"), layers.Dense(PIXELS, "sigmoid")]
    )
    random = np.random.default_rng(0)
    x = (random.random((4 * BATCH, PIXELS)) < 0.4).astype("float32")
    epsilon = random.normal(size=(4 * BATCH, LATENT)).astype("float32")
    vae = VAE(encoder, decoder)
    vae.compile(optimizer=way.optimizer(keras.optimizers.Adam(1e-2)))
    history = vae.fit(
        way.share(x),
        way.share(epsilon),
        batch_size=BATCH // way.size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=list(way.callbacks),
    )
    return {"weights": weights_of(encoder, decoder), "logs": history.history}
