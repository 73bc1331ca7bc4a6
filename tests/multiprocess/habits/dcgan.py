"""A DCGAN: a model without `call`, with two optimizers of its own and its own training step.

After https://keras.io/examples/generative/dcgan_overriding_train_step. Noise comes with the images, so that
one process and several see the same.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from tests.multiprocess.habits.way import weights_of

LATENT, BATCH = 3, 8


class GAN(keras.Model):
    def __init__(self, discriminator, generator):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn
        self.d_loss_metric = keras.metrics.Mean(name="d_loss")
        self.g_loss_metric = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_metric, self.g_loss_metric]

    def train_step(self, data):
        images, noise = data
        count = tf.shape(images)[0]
        both = tf.concat([self.generator(noise), images], axis=0)
        labels = tf.concat([tf.ones((count, 1)), tf.zeros((count, 1))], axis=0)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(both))
        gradients = tape.gradient(d_loss, self.discriminator.trainable_weights)
        self.d_optimizer.apply_gradients(zip(gradients, self.discriminator.trainable_weights, strict=True))
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(tf.zeros((count, 1)), self.discriminator(self.generator(noise)))
        gradients = tape.gradient(g_loss, self.generator.trainable_weights)
        self.g_optimizer.apply_gradients(zip(gradients, self.generator.trainable_weights, strict=True))
        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}


def main(way):
    keras.utils.set_random_seed(1)
    discriminator = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Flatten(),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    generator = keras.Sequential(
        [
            keras.Input((LATENT,)),
            layers.Dense(4 * 4 * 2),
            layers.Reshape((4, 4, 2)),
            layers.Conv2DTranspose(4, 4, strides=2, padding="same"),
            layers.LeakyReLU(negative_slope=0.2),
            layers.Conv2D(1, 3, padding="same", activation="sigmoid"),
        ]
    )
    random = np.random.default_rng(0)
    images = random.random((4 * BATCH, 8, 8, 1)).astype("float32")
    noise = random.normal(size=(4 * BATCH, LATENT)).astype("float32")
    gan = GAN(discriminator, generator)
    gan.compile(
        d_optimizer=way.optimizer(keras.optimizers.Adam(1e-2)),
        g_optimizer=way.optimizer(keras.optimizers.Adam(1e-2)),
        loss_fn=keras.losses.BinaryCrossentropy(),
    )
    history = gan.fit(
        way.share(images),
        way.share(noise),
        batch_size=BATCH // way.size,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=list(way.callbacks),
    )
    return {"weights": weights_of(generator, discriminator), "logs": history.history}
